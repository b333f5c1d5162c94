"""Every segmenter this project knows, and the one function that reads any of them."""

from __future__ import annotations

import json
from pathlib import Path

from ppcr.model.image_encoder import ImageFeatures
from ppcr.model.mask_decoder import CellFeatures
from ppcr.model.sam import SamSegmenter
from ppcr.model.sam_config import ARCHITECTURES
from ppcr.model.sam_features import PlainFeatures
from ppcr.model.segmenter import Segmenter
from ppcr.model.segmenter_files import read_config

AnySegmenter = Segmenter | SamSegmenter
AnyFeatures = CellFeatures | ImageFeatures | PlainFeatures


def load_segmenter(folder: Path) -> AnySegmenter:
    """Read segmenter/ of a checkpoint as an fp32 module in evaluation mode on the CPU.

    Raises:
        OSError, ValueError: a file is missing or damaged, or of no architecture known here.
    """
    values = json.loads(read_config(folder))
    if not isinstance(values, dict):
        raise ValueError(f"config.json of {folder} is not a JSON object")
    if values.get("architecture") in ARCHITECTURES:
        return SamSegmenter.load(folder)
    return Segmenter.load(folder)
