"""config.json of a checkpoint: which prompts, which frames, which families."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ppcr.errors import CheckpointError
from ppcr.files import read_json
from ppcr.kinds import read_fields, require_kinds

FORMAT = 1


@dataclass(frozen=True)
class MLLMConfig:
    """How the MLLM is spoken to.

    Attributes:
        family: architecture, as ``model_type`` of its Hugging Face configuration.
        image_size: height and width in pixels an image is stretched to.
        resolutions: several such sizes instead, ``image_size`` the first: each image is stretched to the one
            of its own proportions, or the nearest to them.
        resample: filter of that stretching, "bilinear" or "bicubic".
        patch, merge, temporal: patch side in pixels, patches merged along a side, frames a patch spans.
        mean, std: per channel, for pixel values in 0..1.
        ruler: location tokens that open the system turn.
        location_step: of the thousand location tokens every how many-th may be answered (`ppcr.tokenizer`).
        max_expression_tokens: longest expression.
        max_length: tokens of both turns together, image tokens included: the static KV cache's length.
    """

    family: str = "qwen2_5_vl"
    image_size: tuple[int, int] = (128, 128)
    patch: int = 8
    merge: int = 2
    temporal: int = 2
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    ruler: int = 8
    location_step: int = 1
    max_expression_tokens: int = 96
    max_length: int = 384
    resample: str = "bilinear"
    resolutions: tuple[tuple[int, int], ...] = ()

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Every (height, width) an image may be stretched to."""
        return self.resolutions or (self.image_size,)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of image tokens at a size."""
        side = self.patch * self.merge
        return size[0] // side, size[1] // side

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens at ``image_size``."""
        return self.grid_of(self.image_size)

    @property
    def image_tokens(self) -> int:
        """Tokens an image takes at ``image_size``."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class SegmenterConfig:
    """How the segmenter is fed: height and width, and normalisation of pixel values in 0..1.

    fit: how an image comes to that size, "stretch" or "pad" (`ppcr.framing`).
    """

    family: str = "ppcr_tiny"
    image_size: tuple[int, int] = (256, 256)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    fit: str = "stretch"


@dataclass(frozen=True)
class PPCRConfig:
    """A whole checkpoint.

    Attributes:
        box_convention: how the MLLM writes boxes (`ppcr.boxes`). ``loc1000``: boxes and points are location
            tokens, thousandths of width and height. ``pixels``: numbers, in pixels of the resized image.
            ``thousandths``: numbers, 0 to 1000 of width and height.
    """

    name: str = "ppcr-tiny"
    format: int = FORMAT
    box_convention: str = "loc1000"
    mllm: MLLMConfig = field(default_factory=MLLMConfig)
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)

    def to_dict(self) -> dict[str, Any]:
        """The fields as config.json has them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read what ``to_dict`` wrote.

        Raises:
            CheckpointError: of another format, or fields are missing, unknown or of another kind.
        """
        if data.get("format") != FORMAT:
            raise CheckpointError(
                f"this checkpoint has format {data.get('format')!r}, this version of ppcr reads {FORMAT}: "
                "install the ppcr that wrote it, or train or compose the checkpoint again"
            )
        try:
            parts = {
                "mllm": read_fields(MLLMConfig, data["mllm"]),
                "segmenter": read_fields(SegmenterConfig, data["segmenter"]),
            }
            return require_kinds(cls(**{**data, **parts}))
        except (TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"the checkpoint's config.json does not fit this version of ppcr: {error}"
            ) from None

    @classmethod
    def load(cls, checkpoint: Path) -> Self:
        """Read ``checkpoint/config.json``.

        Raises:
            CheckpointError: missing, unreadable, or as `from_dict`.
        """
        missing = f"{checkpoint} is not a checkpoint: expected config.json, mllm/ and segmenter/ in it"
        return cls.from_dict(read_json(checkpoint / "config.json", CheckpointError, missing=missing))
