"""The segmenter as two TensorRT engines; pixels and masks are copied on a stream of their own."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from runtime.device import PinnedArray, Stream
from runtime.session import Float32Array, Prompts
from runtime.tensorrt_cache import DeviceFeatures
from runtime.tensorrt_engine import Engine

_PROMPTS = ("boxes", "points", "spatial_valid", "text_embeddings", "text_mask")


class TensorRTSegmenter:
    """`runtime.session.SegmenterSession`. Threads may share it; they take turns."""

    def __init__(self, image_encoder: Engine, mask_decoder: Engine) -> None:
        self._encoder, self._decoder = image_encoder, mask_decoder
        self._lock = threading.Lock()
        self._stream, self._copies = Stream(), Stream()
        # Families differ in what they keep of an image: SAM 2 and ppcr-tiny add finer features.
        self._features = [name for name in image_encoder.tensors if name != "pixels"]
        self._see, self._draw = image_encoder.context(self._stream), mask_decoder.context(self._stream)
        self._pinned = PinnedArray(image_encoder.tensors["pixels"].shape, np.float32)
        self._pixels = image_encoder.memory("pixels")
        self._see.bind("pixels", self._pixels.address)
        kinds = {"text_mask": np.bool_}
        most = {name: mask_decoder.most(name) for name in _PROMPTS}
        self.most_prompts = most["boxes"][0]
        self._given = {name: PinnedArray(shape, kinds.get(name, np.float32)) for name, shape in most.items()}
        self._inputs = {name: mask_decoder.memory(name, shape) for name, shape in most.items()}
        side = mask_decoder.tensors["mask_logits"].shape[1:]
        self._masks = PinnedArray((self.most_prompts, *side), np.float32)
        self._scores = PinnedArray((self.most_prompts,), np.float32)
        results = {"mask_logits": self._masks, "scores": self._scores}
        self._outputs = {name: mask_decoder.memory(name, r.array.shape) for name, r in results.items()}
        for name, memory in {**self._inputs, **self._outputs}.items():
            self._draw.bind(name, memory.address)

    def encode(self, pixels: Float32Array) -> DeviceFeatures:
        """Pixels f32 [3, H, W] to the features of one image on the GPU."""
        with self._lock:
            memory = {name: self._encoder.memory(name) for name in self._features}
            self._pinned.array[0] = pixels
            self._copies.upload(self._pixels.address, self._pinned.address, self._pinned.array.nbytes)
            self._stream.after(self._copies.record())
            for name, held in memory.items():
                self._see.bind(name, held.address)
            self._see.run()
            ready = self._stream.record()
            self._stream.wait()
        return DeviceFeatures(memory, ready)

    def decode(self, features: DeviceFeatures, prompts: Prompts) -> tuple[Float32Array, Float32Array]:
        """Mask logits f32 [N, h, w] and scores f32 [N]; more prompts than an engine takes go in turns."""
        parts = []
        for first in range(0, len(prompts.boxes), self.most_prompts):
            rows = slice(first, first + self.most_prompts)
            with self._lock:
                parts.append(
                    self._decode(features, {name: getattr(prompts, name)[rows] for name in _PROMPTS})
                )
        logits, scores = zip(*parts, strict=True)
        return np.concatenate(logits), np.concatenate(scores)

    def _decode(
        self, features: DeviceFeatures, given: dict[str, npt.NDArray[np.generic]]
    ) -> tuple[Float32Array, Float32Array]:
        count = len(given["boxes"])
        for name, value in given.items():
            # Dense at the front: a tensor's rows follow each other without gaps, whatever its longest shape.
            dense = self._given[name].array.reshape(-1)[: value.size]
            dense[...] = np.ravel(value)
            self._copies.upload(self._inputs[name].address, self._given[name].address, dense.nbytes)
            self._draw.shape(name, value.shape)
        self._stream.after(self._copies.record())
        self._stream.after(features.ready)
        for name, memory in features.memory.items():
            self._draw.bind(name, memory.address)
        self._draw.run()
        self._copies.after(self._stream.record())
        masks, scores = self._masks.array[:count], self._scores.array[:count]
        self._copies.download(self._masks.address, self._outputs["mask_logits"].address, masks.nbytes)
        self._copies.download(self._scores.address, self._outputs["scores"].address, scores.nbytes)
        self._copies.wait()
        return masks.copy(), scores.copy()
