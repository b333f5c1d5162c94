"""The vision towers of a bundle as TensorRT engines, one for each image size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime.device import DeviceMemory, PinnedArray, Stream
from runtime.session import Float32Array
from runtime.tensorrt_cache import DeviceFeatures
from runtime.tensorrt_engine import Engine

Size = tuple[int, int]


class Tower:
    """One engine with its input bound once; what it makes of an image is new memory each time."""

    def __init__(self, engine: Engine, stream: Stream) -> None:
        self._engine, self._stream = engine, stream
        self._see = engine.context(stream)
        self._patches = PinnedArray(engine.tensors["pixel_values"].shape, np.float32)
        self._pixels = engine.memory("pixel_values")
        self._see.bind("pixel_values", self._pixels.address)
        self._made = [name for name in engine.tensors if name != "pixel_values"]

    def encode(self, patches: Float32Array) -> DeviceFeatures:
        """Patches f32 [patches, patch_dim] to features f32 [image_tokens, hidden], one for each level."""
        features: dict[str, DeviceMemory] = {name: self._engine.memory(name) for name in self._made}
        self._patches.array[...] = patches
        self._stream.upload(self._pixels.address, self._patches.address, self._patches.array.nbytes)
        for name, memory in features.items():
            self._see.bind(name, memory.address)
        self._see.run()
        ready = self._stream.record()
        self._stream.wait()
        return DeviceFeatures(features, ready, self._engine.tensors["image_features"].shape[0])


class Towers:
    """Towers by image size (height, width); those beyond the first are loaded when they are needed.

    load: the engine of a size.
    """

    def __init__(self, first: Size, load: Callable[[Size], Engine], stream: Stream) -> None:
        self._load, self._stream = load, stream
        self._opened = {first: Tower(load(first), stream)}

    def of(self, size: Size) -> Tower:
        if size not in self._opened:
            self._opened[size] = Tower(self._load(size), self._stream)
        return self._opened[size]
