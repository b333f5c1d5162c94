"""The official MobileSAM in torch eager, from its own package: what a user would run without this project.

The package is no part of this project: ``pip install git+https://github.com/ChaoningZhang/MobileSAM.git
timm torchvision`` in an environment for this purpose. Images come in as `ppcr.framing` makes them, so that
the network alone is compared.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ppcr.errors import UsageError
from ppcr.framing import Framing

NAME = "official"
Float32Array = npt.NDArray[np.float32]


class Official:
    """The model of package ``mobile_sam``, prompted with boxes, one mask each."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._side = int(model.image_encoder.img_size)

    @classmethod
    def load(cls, weights: Path, *, threads: int) -> Official:
        """The published ``mobile_sam.pt``. torch runs on ``threads`` threads from then on.

        Raises:
            UsageError: the package is not installed, or the weights are of another model.
            CheckpointError: the weights cannot be read.
        """
        import torch

        from ppcr.model.sam_import import read_state_dict

        try:
            package = importlib.import_module("mobile_sam")
        except ImportError as error:
            raise UsageError(
                f"--official needs the package mobile_sam ({error}): install it from "
                "https://github.com/ChaoningZhang/MobileSAM, or leave out --official"
            ) from None
        model = package.sam_model_registry["vit_t"]()
        try:
            model.load_state_dict(read_state_dict(weights))
        except RuntimeError:
            raise UsageError(f"{weights} does not fit the official MobileSAM: give mobile_sam.pt") from None
        torch.set_num_threads(threads)
        return cls(model.eval())

    def encode(self, pixels: Float32Array) -> Any:
        """Pixels f32 [3, S, S], normalised and padded, to the image's embedding."""
        import torch

        with torch.inference_mode():
            return self._model.image_encoder(torch.from_numpy(pixels)[None])

    def decode(self, features: Any, boxes: Float32Array) -> Any:
        """Logits, a tensor f32 [N, 1, h, w], of boxes f32 [N, 4] xyxy in 0..1 of the square input."""
        import torch

        model = self._model
        with torch.inference_mode():
            given = torch.from_numpy(np.ascontiguousarray(boxes * self._side, np.float32))
            sparse, dense = model.prompt_encoder(points=None, boxes=given, masks=None)
            logits, _ = model.mask_decoder(
                image_embeddings=features,
                image_pe=model.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
        return logits

    def masks(self, logits: Any, framing: Framing) -> npt.NDArray[np.bool_]:
        """Logits to bool [N, H, W] at the image's size, by the official steps."""
        import torch

        with torch.inference_mode():
            large = self._model.postprocess_masks(logits, framing.content, framing.size)
        return np.asarray(large[:, 0].numpy() > 0, np.bool_)
