"""OpenVINO on the CPU for both image encoders and the mask decoder, in fp32 or, where asked for, bfloat16.

The decoder stays with onnxruntime: OpenVINO does not know TensorScatter, which updates the KV cache in place.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ppcr.errors import BundleError, EngineError
from ppcr.manifest import REBUILD
from runtime.bundle import AUTO, Bundle
from runtime.onnxruntime_library import write_out_functions
from runtime.onnxruntime_session import OnnxMLLM, load_decoder
from runtime.session import Float32Array, Prompts, Sessions

_PROMPTS = ("boxes", "points", "spatial_valid", "text_embeddings", "text_mask")


def load(bundle: Bundle, *, threads: int, precision: str = AUTO) -> Sessions:
    """Both sessions of a bundle, in the precision of its graphs, or fp32 graphs computed in "bf16".

    Raises:
        BundleError: a graph cannot be read, as onnxruntime's `load`.
        EngineError: bf16 is asked for, and this processor has no instructions for it.
    """
    if bundle.manifest.shapes.deepstack or len(bundle.config.mllm.sizes) > 1:
        raise BundleError("the OpenVINO engine takes MLLMs of one image size without DeepStack alone")
    core = ov.Core()
    half = precision == "bf16"
    if half and not has_bf16(core):
        raise EngineError("this processor has no bfloat16 instructions: use --precision fp32")
    compiled = {
        role: _compile(core, bundle.graphs[role], threads, bf16=half) for role in ("vision", "image_encoder")
    }
    with tempfile.TemporaryDirectory(prefix="ppcr-openvino-") as folder:  # OpenVINO reads no functions
        plain = write_out_functions(bundle.graphs["mask_decoder"], Path(folder))
        compiled["mask_decoder"] = _compile(core, plain, threads, bf16=half)
    mllm = OpenVinoMLLM(compiled["vision"], bundle, threads=threads)
    segmenter = OpenVinoSegmenter(compiled["image_encoder"], compiled["mask_decoder"])
    return Sessions(mllm, segmenter, precision="bf16" if half else bundle.precision)


def _compile(core: ov.Core, path: Path, threads: int, *, bf16: bool = False) -> ov.CompiledModel:
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        # OpenVINO takes bf16 by itself where it can: say f32 as well.
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
    }
    try:
        return core.compile_model(str(path), "CPU", settings)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise BundleError(f"OpenVINO {ov.__version__} cannot read {path}: {reason}; {REBUILD}") from error


def has_bf16(core: ov.Core) -> bool:
    """Whether the processor has instructions for products in bfloat16."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoMLLM(OnnxMLLM):
    """`runtime.session.MLLMSession`: the vision tower on OpenVINO, the decoder on onnxruntime."""

    def __init__(self, vision: ov.CompiledModel, bundle: Bundle, *, threads: int) -> None:
        super().__init__(None, load_decoder(bundle, threads=threads), bundle)
        self._tower = vision

    def encode_image(self, patches: Float32Array, *, size: tuple[int, int] | None = None) -> Float32Array:
        """Patches f32 [patches, patch_dim] to features f32 [image_tokens, hidden]."""
        # A request of its own for each call: threads may share the session.
        features: Float32Array = self._tower.create_infer_request().infer({"pixel_values": patches})[0]
        return features.copy()


class OpenVinoSegmenter:
    """`runtime.session.SegmenterSession`. Threads may share it."""

    def __init__(self, image_encoder: ov.CompiledModel, mask_decoder: ov.CompiledModel) -> None:
        self._encoder, self._decoder = image_encoder, mask_decoder

    def encode(self, pixels: Float32Array) -> dict[str, Float32Array]:
        """Pixels f32 [3, H, W] to the features of one image, by output name."""
        found = self._encoder.create_infer_request().infer({"pixels": pixels[None]})
        return {output.any_name: found[output].copy() for output in self._encoder.outputs}

    def decode(
        self, features: dict[str, Float32Array], prompts: Prompts
    ) -> tuple[Float32Array, Float32Array]:
        """Mask logits f32 [N, h, w] and scores f32 [N]."""
        given = {name: np.ascontiguousarray(getattr(prompts, name)) for name in _PROMPTS}
        found = self._decoder.create_infer_request().infer({**features, **given})
        return found["mask_logits"].copy(), found["scores"].copy()
