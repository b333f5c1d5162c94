"""Every kind of image file a user may bring, good and bad, and the steps to model input."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ppcr.errors import ImageError
from ppcr.images import as_rgb, load_image, normalise, patchify, resize

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.26, 0.27)

Array = npt.NDArray[Any]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> npt.NDArray[np.uint8]:
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(folder: Path, image: Image.Image, name: str = "image.png", **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def png_of_size(width: int, height: int) -> bytes:
    """A well-formed PNG header that promises `width` x `height` pixels, with next to no data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def check(image: Array, expected: Array) -> None:
    assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.ppm", "a.webp"])
def test_lossless_formats(tmp_path: Path, name: str) -> None:
    pixels = noise(5, 7)
    path = saved(tmp_path, Image.fromarray(pixels), name, **({"lossless": True} if "webp" in name else {}))
    check(load_image(path), pixels)


def test_one_pixel(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (1, 1), (10, 20, 30)))
    check(load_image(path), np.array([[[10, 20, 30]]]))


def test_jpeg_grey_and_colour(tmp_path: Path) -> None:
    colour = load_image(saved(tmp_path, Image.new("RGB", (16, 8), (200, 30, 30)), "a.jpg", quality=95))
    grey = load_image(saved(tmp_path, Image.new("L", (16, 8), 99), "b.jpg"))
    assert colour.shape == grey.shape == (8, 16, 3)
    assert np.abs(colour.astype(int) - [200, 30, 30]).max() <= 3
    assert np.abs(grey.astype(int) - 99).max() <= 1


def test_cmyk_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16), (250, 10, 20)).convert("CMYK")
    for name in ("a.jpg", "a.tiff"):
        loaded = load_image(saved(tmp_path, image, name))
        assert np.abs(loaded.astype(int) - [250, 10, 20]).max() <= 6


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_sixteen_bit_is_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65407, 65535]], np.uint16)
    loaded = load_image(saved(tmp_path, Image.fromarray(values), name))
    check(loaded, np.repeat(np.array([[0, 0, 1, 1, 128, 255, 255]])[..., None], 3, axis=2))


def test_sixteen_bit_big_endian_and_pgm(tmp_path: Path) -> None:
    values = np.array([[0, 257 * 77, 65535]], ">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 65535\n" + values.tobytes())
    expected = np.repeat(np.array([[0, 77, 255]])[..., None], 3, axis=2)
    check(load_image(tmp_path / "a.pgm"), expected)
    big = Image.frombytes("I;16B", (3, 1), values.tobytes())
    check(as_rgb(big), expected)


def test_float_file_has_no_range(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(np.ones((2, 2), np.float32)), "a.tiff")
    with pytest.raises(ImageError, match="no fixed range; save it as 8-bit"):
        load_image(path)


def test_black_and_white(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(np.array([[True, False]])))
    check(load_image(path), np.array([[[255] * 3, [0] * 3]]))


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    check(load_image(saved(tmp_path, image)), np.array([[[255, 0, 0], [0, 0, 255]]]))
    see_through = saved(tmp_path, image, "t.png", transparency=1)
    check(load_image(see_through), np.array([[[255, 0, 0], [255, 255, 255]]]))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, 128, 0)):
        image.putpixel((x, 0), (0, 0, 0, alpha))
    loaded = load_image(saved(tmp_path, image.convert(mode)))
    assert loaded[0, :, 0].tolist() == [0, 127, 255]
    assert (loaded == loaded[..., :1]).all()


def test_a_transparent_colour_is_laid_over_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    path = saved(tmp_path, image, transparency=(1, 2, 3))
    check(load_image(path), np.array([[[255] * 3, [4, 5, 6]]]))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tiff"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    check(load_image(path), np.broadcast_to(np.array([255, 0, 0], np.uint8), (6, 8, 3)))


# What each EXIF orientation asks a viewer to do with the stored pixels.
SHOWN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tiff"])
def test_exif_orientation_is_applied_once(tmp_path: Path, orientation: int, name: str) -> None:
    pixels = noise(3, 5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, Image.fromarray(pixels), name, exif=exif, **options)
    check(load_image(path), SHOWN[orientation](pixels))


def test_exif_orientation_of_a_jpeg(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    loaded = load_image(saved(tmp_path, Image.fromarray(pixels), "a.jpg", exif=exif))
    assert loaded.shape == (32, 16, 3)
    assert loaded[:14].min() > 200 and loaded[18:].max() < 55


def test_damaged_exif_does_not_cost_the_image(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(noise(4, 4)), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert load_image(path).shape == (4, 4, 3)


def test_missing_folder_and_odd_paths(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file; check the path"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="it is a folder"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="not a regular file"):
        load_image("/dev/zero")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "file" / "a.png")
    for odd in ("", "a\0b", "n" * 5000):
        with pytest.raises(ImageError, match="cannot read image"):
            load_image(odd)


def test_empty_and_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    with pytest.raises(ImageError, match="the file is empty"):
        load_image(path)
    for data in (b"hello, I am text\n" * 50, b"%PDF-1.7\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 1000):
        path.write_bytes(data)
        with pytest.raises(ImageError, match="convert it to PNG or JPEG"):
            load_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "JPEG2000"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_truncated_files(tmp_path: Path, kind: str, share: float) -> None:
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(whole, format=kind)
    path = tmp_path / "cut"
    path.write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * share)])
    with pytest.raises(ImageError, match="damaged or cut short|no known kind"):
        load_image(path)


@given(st.data())
def test_damaged_files_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = io.BytesIO()
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "ICO"]))
    Image.fromarray(noise(16, 16)).save(whole, format=kind)
    damaged = bytearray(whole.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    try:
        image = load_image(path)
    except ImageError as error:
        assert str(path) in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (12_000, 10_000), (50_000_001, 1)])
def test_too_many_pixels_are_refused_from_the_header(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "a.png").write_bytes(png_of_size(width, height))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="too large.*50 megapixels; shrink it first"):
            load_image(tmp_path / "a.png")


def test_the_limit_can_be_moved(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (10, 10)))
    assert load_image(path, max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(ImageError, match=r"\(10x10\)"):
        load_image(path, max_pixels=99)


def test_as_rgb_takes_paths_pictures_and_arrays(tmp_path: Path) -> None:
    pixels = noise(4, 6)
    path = saved(tmp_path, Image.fromarray(pixels))
    wide = pixels.astype(np.uint16) * np.uint16(257)
    for source in (path, str(path), Image.fromarray(pixels), pixels, pixels / 255.0, wide):
        check(as_rgb(source), pixels)
    check(as_rgb(pixels[:, ::-1]), pixels[:, ::-1])
    grey = noise(4, 6, 0)
    for source in (grey, grey[..., None]):
        check(as_rgb(source), np.repeat(grey[..., None], 3, axis=2))
    clear = np.zeros((2, 2, 4), np.uint8)
    check(as_rgb(clear), np.full((2, 2, 3), 255))
    check(as_rgb(np.array([[True, False]])), np.array([[[255] * 3, [0] * 3]]))


def test_as_rgb_answers_with_a_new_array() -> None:
    pixels = noise(2, 2)
    as_rgb(pixels)[:] = 0
    np.testing.assert_array_equal(pixels, noise(2, 2))


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((2, 2, 5), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.full((2, 2), 2.0),
        np.full((2, 2), np.nan),
        np.zeros((2, 2), np.int64),
        Image.new("F", (2, 2)),
        3,
        None,
    ],
    ids=str,
)
def test_as_rgb_refuses(source: Any) -> None:
    with pytest.raises(ImageError, match="cannot use"):
        as_rgb(source)


def test_as_rgb_limits_arrays_and_pictures_too() -> None:
    with pytest.raises(ImageError, match="too large"):
        as_rgb(np.zeros((3, 4), np.uint8), max_pixels=11)
    with pytest.raises(ImageError, match="too large"):
        as_rgb(Image.new("L", (3, 4)), max_pixels=11)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (300, 2), (256, 256)])
def test_resize_stretches_to_height_and_width(height: int, width: int) -> None:
    image = np.full((height, width, 3), 77, np.uint8)
    check(resize(image, (16, 24)), np.full((16, 24, 3), 77))


def test_resize_is_antialiased_when_shrinking() -> None:
    stripes = np.zeros((8, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    shrunk = resize(stripes, (8, 16)).astype(int)
    assert np.abs(shrunk - 127).max() <= 5


def test_normalise_is_the_documented_formula() -> None:
    image = noise(3, 5)
    result = normalise(image, MEAN, STD)
    assert result.dtype == np.float32 and result.flags.c_contiguous and result.shape == (3, 3, 5)
    np.testing.assert_allclose(result, ((image / 255 - MEAN) / STD).transpose(2, 0, 1), rtol=1e-5, atol=1e-6)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))
def test_patchify_places_every_pixel(patch: int, merge: int, temporal: int, rows: int, columns: int) -> None:
    height, width = rows * patch * merge, columns * patch * merge
    pixels = np.arange(3 * height * width, dtype=np.float32).reshape(3, height, width)
    patches = patchify(pixels, patch, merge, temporal)
    assert patches.shape == (rows * columns * merge * merge, 3 * temporal * patch * patch)
    number = 0
    for row, column, mr, mc in np.ndindex(rows, columns, merge, merge):
        top, left = (row * merge + mr) * patch, (column * merge + mc) * patch
        piece = pixels[:, top : top + patch, left : left + patch]
        expected = np.stack([piece] * temporal, axis=1).ravel()
        np.testing.assert_array_equal(patches[number], expected)
        number += 1


def test_patchify_refuses_an_odd_size() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        patchify(np.zeros((3, 16, 24), np.float32), 8, 2, 2)


def test_pixels_equal_the_hugging_face_processor() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    package = "transformers.models.qwen2_vl.image_processing"
    try:
        processor = import_module(f"{package}_pil_qwen2_vl").Qwen2VLImageProcessorPil
    except ImportError:  # transformers 4: the numpy processor has the plain name
        processor = import_module(f"{package}_qwen2_vl").Qwen2VLImageProcessor
    image = noise(128, 96)
    reference = processor(
        do_resize=False, patch_size=8, temporal_patch_size=2, merge_size=2, image_mean=MEAN, image_std=STD
    )
    expected = reference(images=[Image.fromarray(image)], return_tensors="np")
    ours = patchify(normalise(image, MEAN, STD), 8, 2, 2)
    assert expected["image_grid_thw"].tolist() == [[1, 16, 12]]
    np.testing.assert_allclose(ours, expected["pixel_values"], rtol=0, atol=1e-6)
