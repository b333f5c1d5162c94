"""The command line from end to end in its own process: files, output, bad input and exit codes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ppcr import masks
from ppcr.boxes import repair
from runtime.infer import main
from tests import factory

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "runtime" / "infer.py")
IMAGE_CODE, EXPRESSION_CODE, BOX_CODE, BUNDLE_CODE, OUTPUT_CODE = 3, 4, 5, 6, 8
# Both prompts given, so that random weights cannot answer "none": the masks are there to be looked at.
GIVEN = ("--semantic", "cube; red; any; one", "--box", "10,12,90,80")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "scene.png"
    Image.fromarray(factory.picture()).save(path)
    return path


def infer(
    *arguments: object, cwd: Path = ROOT, limit: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, preexec_fn=limit, timeout=120)


def with_bundle(*arguments: object) -> tuple[object, ...]:
    return ("--bundle", factory.random_bundle(), *arguments)


def assert_refused(run: subprocess.CompletedProcess[str], code: int, told: str = "") -> None:
    assert run.returncode == code, (run.stdout, run.stderr)
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: ") and told in line


def test_one_expression_writes_its_files_and_a_table(scene: Path, tmp_path: Path) -> None:
    run = infer(*with_bundle("--image", scene, "--expression", "the red cube", *GIVEN), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    overlay = tmp_path / "outputs" / "scene" / "overlay.png"
    assert lines[-1] == str(overlay.relative_to(tmp_path))
    assert {p.name for p in overlay.parent.iterdir()} == {"overlay.png", "mask_0.png", "result.json"}
    assert "semantic    cube; red; any; one" in run.stdout and "box 10.0, 12.0, 90.0, 80.0" in run.stdout
    for stage in ("image", "encoder", "decoder", "masks", "total"):
        assert f"  {stage} " in run.stdout
    saved = json.loads((overlay.parent / "result.json").read_text())
    mask = np.asarray(Image.open(overlay.parent / "mask_0.png")) > 0
    np.testing.assert_array_equal(masks.decode_rle(saved["masks"][0]), mask)
    assert mask.shape == (120, 160)
    assert Image.open(overlay).size[0] >= 160


def test_both_stages_run_without_anything_given(scene: Path, tmp_path: Path) -> None:
    run = infer(
        *with_bundle("--image", scene, "--expression", "the red cube", "--output", tmp_path / "out", "--json")
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["given"] == [] and result["timings"]["forward_calls"] > 4
    assert result["semantic"]["count"] == len(result["masks"]) == len(result["spatial"]["boxes"])


def test_several_expressions_have_folders_of_their_own(scene: Path, tmp_path: Path) -> None:
    arguments = ("--expression", "the red cube", "--expression", "all spheres", "--output", tmp_path / "out")
    run = infer(*with_bundle("--image", scene, *arguments, "--precision", "fp32", "--threads", 1))
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(tmp_path / "out" / "2" / "overlay.png")
    told = [json.loads((tmp_path / "out" / n / "result.json").read_text())["expression"] for n in "12"]
    assert told == ["the red cube", "all spheres"]
    run = infer(*with_bundle("--image", scene, *arguments, "--json"))
    assert [result["expression"] for result in json.loads(run.stdout)] == told


def test_several_boxes_give_several_masks(scene: Path, tmp_path: Path) -> None:
    boxes = ("--box", "0,0,50,50", "--box", "60.5,20,160,120")
    run = infer(
        *with_bundle("--image", scene, "--expression", "cubes", *boxes, "--output", tmp_path, "--json")
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["spatial"]["boxes"] == [[0, 0, 50, 50], [60.5, 20, 160, 120]]
    assert result["given"] == ["boxes"] and len(result["masks"]) == 2


def test_none_is_an_answer(scene: Path, tmp_path: Path) -> None:
    run = infer(
        *with_bundle("--image", scene, "--expression", "a cube", "--semantic", "cube; any; any; none"),
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "none: nothing in the image fits" in run.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"overlay.png", "result.json"}


def test_cold_start_to_the_first_mask_is_under_three_seconds(scene: Path, tmp_path: Path) -> None:
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        run = infer(
            *with_bundle("--image", scene, "--expression", "cube", *GIVEN, "--output", tmp_path / "o"),
            "--engine",
            "onnxruntime",
        )
        # What the base install has; others take seconds to compile their graphs.
        taken.append(time.perf_counter() - start)
        assert run.returncode == 0, run.stderr
    assert min(taken) < 3


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--image", "x.png"),
        ("--expression", "x"),
        ("--image", "x.png", "--expression", "x", "--precision", "fp4"),
        ("--image", "x.png", "--expression", "x", "--threads", "two"),
        ("--image", "x.png", "--expression", "x", "--unknown"),
        ("--image", "x.png", "--expression", "x", "--expression", "y", "--box", "0,0,9,9"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...]) -> None:
    assert_refused(infer(*arguments), 2)


def test_no_threads(scene: Path) -> None:
    run = infer(*with_bundle("--image", scene, "--expression", "x", "--threads", 0))
    assert_refused(run, 2, "threads")


def test_help_names_the_exit_codes() -> None:
    run = infer("--help")
    assert run.returncode == 0 and "--semantic" in run.stdout and "exit codes" in run.stdout


def save(mode: str, **options: Any) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(factory.picture()).convert(mode).save(path, **options)


def sixteen_bit(path: Path) -> None:
    Image.fromarray(factory.picture()[..., 0].astype(np.uint16) * 257).save(path)


def animated(path: Path) -> None:
    frames = [Image.fromarray(factory.picture(seed)) for seed in (0, 1)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(factory.picture()).save(path, exif=exif)


def one_pixel(path: Path) -> None:
    Image.new("RGB", (1, 1), (200, 10, 10)).save(path)


@pytest.mark.parametrize(
    ("name", "make", "size"),
    [
        ("cmyk.jpg", save("CMYK"), (120, 160)),
        ("palette.gif", save("P"), (120, 160)),
        ("grey.png", save("LA"), (120, 160)),
        ("sixteen.png", sixteen_bit, (120, 160)),
        ("animated.gif", animated, (120, 160)),
        ("turned.jpg", turned, (160, 120)),
        ("one.png", one_pixel, (1, 1)),
        ("wrong_suffix.txt", save("RGB", format="PNG"), (120, 160)),
    ],
)
def test_unusual_images(
    name: str,
    make: Callable[[Path], None],
    size: tuple[int, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / name)
    arguments = with_bundle("--image", tmp_path / name, "--expression", "the cube", "--json")
    assert main([str(a) for a in (*arguments, "--output", tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["image"]["height"], result["image"]["width"]) == size
    assert [rle["size"] for rle in result["masks"]] == [list(size)] * len(result["masks"])


def truncated(path: Path) -> None:
    save("RGB")(path)
    path.write_bytes(path.read_bytes()[:-200])


def enormous(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path)


@pytest.mark.parametrize(
    ("name", "make", "told"),
    [
        ("missing.png", lambda path: None, "no such file"),
        ("empty.png", lambda path: path.write_bytes(b""), "empty"),
        ("truncated.png", truncated, "damaged or cut short"),
        ("text.png", lambda path: path.write_text("hello"), "no known kind of image"),
        ("folder.png", lambda path: path.mkdir(), "folder"),
        ("enormous.png", enormous, "too large"),
    ],
)
def test_bad_images(name: str, make: Callable[[Path], object], told: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    run = infer(*with_bundle("--image", tmp_path / name, "--expression", "x", "--output", tmp_path / "out"))
    assert_refused(run, IMAGE_CODE, told)
    assert not (tmp_path / "out").exists()


def test_no_image_name(tmp_path: Path) -> None:
    run = infer(*with_bundle("--image", "", "--expression", "x", "--output", tmp_path / "out"))
    assert_refused(run, IMAGE_CODE, "empty")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("\x07\x1b", "empty"),
        ("\u200b\u202e", "empty"),
        ("x" * 10_000, "10000"),
    ],
)
def test_bad_expressions(expression: str, told: str, scene: Path, tmp_path: Path) -> None:
    run = infer(*with_bundle("--image", scene, "--expression", expression, "--output", tmp_path / "out"))
    assert_refused(run, EXPRESSION_CODE, told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "expression",
    [
        pytest.param("the \U0001f534 ball \U0001f468\u200d\U0001f469", id="emoji"),
        pytest.param("\u05d4\u05e7\u05d5\u05d1\u05d9\u05d4 \u202eevil", id="right_to_left"),
        pytest.param("red\x07\x1b[31mcube\r\n", id="control"),
        pytest.param("<|im_end|> <|loc_001|>", id="special_tokens"),
    ],
)
def test_unusual_expressions(expression: str, scene: Path, tmp_path: Path) -> None:
    run = infer(*with_bundle("--image", scene, "--expression", expression, "--output", tmp_path / "out"))
    assert run.returncode == 0, run.stderr
    assert not any(c in run.stdout for c in ("\x07", "\x1b", "\u202e"))
    assert json.loads((tmp_path / "out" / "result.json").read_text())["expression"] == expression


def test_an_expression_that_is_not_utf8(scene: Path, tmp_path: Path) -> None:
    arguments = with_bundle("--image", scene, "--output", tmp_path / "out", "--expression")
    command = [os.fsencode(str(a)) for a in (sys.executable, SCRIPT, *arguments)]
    run = subprocess.run([*command, b"red \xff cube"], cwd=ROOT, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.decode().splitlines()[-1] == str(tmp_path / "out" / "overlay.png")


@pytest.mark.parametrize("semantic", ["", "cube", "cube; red; any; many", "a; b; c; 1; 2", "x" * 2000])
def test_bad_semantic_prompts(semantic: str, scene: Path) -> None:
    run = infer(*with_bundle("--image", scene, "--expression", "x", "--semantic", semantic))
    assert_refused(run, EXPRESSION_CODE, "semantic prompt")


@pytest.mark.parametrize(
    "box",
    [
        "0,0,161,50",
        "-5,0,20,20",
        "50,50,20,20",
        "1,2,3",
        "a,b,c,d",
        "0,0,nan,10",
        "",
        "0,0,1e999,4",
        "5,5,5,9",
    ],
)
def test_bad_boxes(box: str, scene: Path, tmp_path: Path) -> None:
    run = infer(
        *with_bundle("--image", scene, "--expression", "x", f"--box={box}", "--output", tmp_path / "o")
    )
    assert_refused(run, BOX_CODE, "box")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("spoil", ["missing", "changed", "foreign", "version", "nothing"])
def test_bad_bundles(spoil: str, scene: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    if spoil != "nothing":
        shutil.copytree(factory.random_bundle(), bundle)
    if spoil == "missing":
        (bundle / "mllm" / "vision.onnx").unlink()
    elif spoil == "changed":
        with (bundle / "tokenizer.json").open("a") as file:
            file.write(" ")
    elif spoil == "foreign":
        (bundle / "other.onnx").write_text("x")
    elif spoil == "version":
        text = (bundle / "manifest.json").read_text()
        (bundle / "manifest.json").write_text(text.replace('"format": 1', '"format": 2'))
    arguments = ("--image", scene, "--expression", "x", "--output", tmp_path / "out")
    assert_refused(infer("--bundle", bundle, *arguments), BUNDLE_CODE, "export/build_engines.py")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere", ""])
def test_unwritable_outputs(place: str, scene: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    output = place if place in ("", "/proc/nowhere") else tmp_path / place
    run = infer(*with_bundle("--image", scene, "--expression", "x", *GIVEN, "--output", output))
    assert_refused(run, OUTPUT_CODE, "cannot write" if place else "empty")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(scene: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    run = infer(*with_bundle("--image", scene, "--expression", "x", *GIVEN, "--output", tmp_path / "out"))
    assert_refused(run, OUTPUT_CODE, "permission denied")


@pytest.mark.parametrize("before", [False, True], ids=["new_folder", "old_result"])
def test_a_full_disk_leaves_nothing_half_written(before: bool, scene: Path, tmp_path: Path) -> None:
    def small_files() -> None:
        # What a full disk does at the write of a large file, without filling one: EFBIG instead of ENOSPC.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    out = tmp_path / "out"
    # An engine that writes temporary files would not start here, and be passed over with a line of its own.
    engine = ("--engine", "onnxruntime")
    arguments = with_bundle("--image", scene, "--expression", "x", *GIVEN, *engine, "--output", out)
    if before:
        assert infer(*arguments).returncode == 0
    held = {p.name: p.read_bytes() for p in out.iterdir()} if before else None
    assert_refused(infer(*arguments, limit=small_files), OUTPUT_CODE, "the disk is full")
    if held is None:
        assert not out.exists()
    else:
        assert {p.name: p.read_bytes() for p in out.iterdir()} == held


def test_a_full_standard_output(scene: Path, tmp_path: Path) -> None:
    arguments = with_bundle(
        "--image", scene, "--expression", "x", *GIVEN, "--output", tmp_path / "out", "--json"
    )
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, SCRIPT, *map(str, arguments)],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert run.returncode == OUTPUT_CODE
    assert len(run.stderr.splitlines()) == 1


def test_boxes_of_a_result_can_be_given_back(scene: Path, tmp_path: Path) -> None:
    first = infer(*with_bundle("--image", scene, "--expression", "x", *GIVEN, "--output", tmp_path, "--json"))
    box = json.loads(first.stdout)["spatial"]["boxes"][0]
    again = infer(
        *with_bundle("--image", scene, "--expression", "x", "--semantic", "cube; red; any; one"),
        "--box", ",".join(map(str, box)), "--output", tmp_path, "--json",
    )  # fmt: skip
    assert json.loads(again.stdout)["masks"] == json.loads(first.stdout)["masks"]
    assert (repair(np.asarray(box) / [160, 120, 160, 120]) >= 0).all()
