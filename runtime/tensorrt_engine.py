"""An engine file checked, loaded and ready to run: what stands between a manifest's entry and a context."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcr.errors import BundleError, EngineError, OutputError
from ppcr.files import sha256_file, write_bytes
from ppcr.manifest import ENGINES, EngineEntry, Manifest
from runtime.device import Device, DeviceMemory, Stream
from runtime.tensorrt_library import TensorRT

Shape = tuple[int, ...]


def rebuild(entry: EngineEntry, bundle: Path) -> str:
    """The command that builds ``entry`` again."""
    flags = "".join(f" --{option}" for option in entry.options)
    return f"{ENGINES} --output {bundle} --target {entry.target} --precision {entry.precision}{flags}"


def require_loadable(
    entry: EngineEntry, manifest: Manifest, bundle: Path, library: TensorRT, device: Device
) -> None:
    """Check an engine before a byte of it is loaded.

    Raises:
        EngineError: it is for another GPU or another version of the library.
        BundleError: the file is missing, cut short or changed, or its graph is another by now.
        Both say the command that builds it again.
    """
    cure = f"rebuild with this command: {rebuild(entry, bundle)}"
    if entry.target != device.target:
        raise EngineError(
            f"{entry.file} is compiled for {entry.target}, this GPU ({device.name}) is {device.target}: "
            f"{ENGINES} --output {bundle} --target {device.target} --precision {entry.precision}"
        )
    if not library.loads(entry.flavour, entry.version, entry.options):
        made = f"{entry.flavour} {entry.version}"
        raise EngineError(f"{entry.file} is compiled by {made}, here is {library.title}; {cure}")
    if "strip-weights" in entry.options:
        plain = rebuild(dataclasses.replace(entry, options=()), bundle)
        raise EngineError(
            f"{entry.file} holds no weights, and this runtime puts none in: build it with: {plain}"
        )
    if manifest.files[entry.onnx].sha256 != entry.onnx_sha256:
        raise BundleError(f"{entry.onnx} is not the graph that {entry.file} was compiled from; {cure}")
    path, wanted = bundle / entry.file, manifest.files[entry.file]
    try:
        same = path.stat().st_size == wanted.bytes and sha256_file(path) == wanted.sha256
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}; {cure}") from None
    if not same:
        raise BundleError(f"{path} is cut short or changed; {cure}")


def require_memory(entries: dict[str, EngineEntry], extra: int, device: Device) -> None:
    """Raise EngineError unless the engines and ``extra`` bytes fit into what is free on the GPU.

    Engines that stream their weights are left out: they keep as many as fit.
    """
    resident = [entry for entry in entries.values() if "weight-streaming" not in entry.options]
    needed = sum(entry.bytes_on_gpu for entry in resident) + extra
    if needed > device.free:
        raise EngineError(
            f"these engines need about {needed / 1e6:.0f} MB on {device.name}, {device.free / 1e6:.0f} of "
            f"{device.total / 1e6:.0f} MB are free: close other programs, or build with --precision int4 or "
            "--weight-streaming"
        )


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine: its shape (-1: dynamic) and the bytes of one element."""

    name: str
    shape: Shape
    itemsize: int


class Engine:
    """A loaded engine.

    Attributes:
        tensors: its inputs and outputs by name.
    """

    def __init__(self, library: TensorRT, runtime: Any, path: Path, cure: str) -> None:
        self._library, self._path = library, path
        data = path.read_bytes()
        reason = library.refusal(runtime, data)
        if reason:
            raise EngineError(f"{library.title} refuses {path}: {reason}; {cure}")
        self._engine = runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise EngineError(f"{library.title} cannot load {path}; {cure}")
        # Before the first context: it takes its memory by this.
        library.stream_weights(self._engine)
        self.tensors: dict[str, Tensor] = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            shape = tuple(int(size) for size in self._engine.get_tensor_shape(name))
            itemsize = int(self._engine.get_tensor_dtype(name).itemsize)
            self.tensors[name] = Tensor(name, shape, itemsize)
        self._kernels = self._read_kernels()
        self._caches: list[Any] = []

    def most(self, name: str, profile: int = 0) -> Shape:
        """The largest shape of an input on optimization profile ``profile``."""
        return tuple(int(size) for size in self._engine.get_tensor_profile_shape(name, profile)[2])

    def memory(self, name: str, shape: Shape | None = None, *, zeroed: bool = False) -> DeviceMemory:
        """New memory that holds the tensor ``name``, at ``shape`` where its own is dynamic."""
        tensor = self.tensors[name]
        size = tensor.itemsize
        for length in shape or tensor.shape:
            size *= length
        return DeviceMemory(size, zeroed=zeroed)

    def context(self, stream: Stream, profile: int = 0) -> Context:
        """A new execution context on ``stream``."""
        made, kernels = self._library.create_context(self._engine, profile, int(stream), self._kernels)
        if made is None:
            raise EngineError(
                f"the GPU has no room for {self._path.name} to run: close other programs, or use a smaller "
                "precision"
            )
        stream.wait()
        if kernels is not None:
            self._caches.append(kernels)
        return Context(made, stream, self._path.name)

    def save_kernels(self) -> None:
        """Keep the kernels that were finished in this process for the next; where one may not write: not."""
        for kernels in self._caches[-1:]:
            finished = bytes(memoryview(kernels.serialize()))
            if finished != self._kernels:
                with suppress(OutputError):
                    write_bytes(self._kernels_path, finished)

    @property
    def _kernels_path(self) -> Path:
        # Hidden, so that it is not a foreign file of the bundle.
        return self._path.with_name(f".{self._path.stem}.kernels")

    def _read_kernels(self) -> bytes:
        try:
            fresh = self._kernels_path.stat().st_mtime >= self._path.stat().st_mtime
            return self._kernels_path.read_bytes() if fresh else b""
        except OSError:
            return b""


class Context:
    """An engine at work on one stream, its tensors bound to addresses."""

    def __init__(self, context: Any, stream: Stream, name: str) -> None:
        self._context, self.stream, self._name = context, stream, name

    def bind(self, name: str, address: int) -> None:
        """Where the tensor ``name`` lies on the GPU."""
        if not self._context.set_tensor_address(name, address):
            raise EngineError(f"{self._name} does not take {name} at this address: this is a bug")

    def shape(self, name: str, shape: Shape) -> None:
        """The shape of a dynamic input from now on."""
        if not self._context.set_input_shape(name, shape):
            raise ValueError(f"{self._name} does not take {name} of shape {shape}")

    def run(self) -> None:
        """Queue one run."""
        if not self._context.execute_async_v3(int(self.stream)):
            raise EngineError(f"{self._name} failed on the GPU: see the messages above")
