"""From a bundle's graphs to TensorRT engines in ``engines/<target>/`` of the same bundle.

The bundle is replaced as a whole: its files are linked into a new folder, the engines are built there, and
the folder is renamed. So an error or Ctrl-C leaves the bundle as it was, and a reader never meets engines
that its manifest does not know.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from export.attention_plugin import parser_environment, require_attention
from export.engine_job import Job, Range
from export.engine_layers import Built
from export.extend import held_files, link_files
from export.float8 import LEAST_TARGET
from export.formats import FORMATS
from export.typed_graph import arithmetic, require_precision
from ppcr.errors import BundleError, EngineError, UsageError
from ppcr.files import atomic_directory, write_json
from ppcr.manifest import MANIFEST, WEIGHTS, EngineEntry, Manifest, Shapes
from runtime import tensorrt_library
from runtime.attention_plugin import OPTION
from runtime.device import current_device
from runtime.tensorrt_library import CURRENT, TensorRT

MAX_PROMPTS = 64
"""Prompts that one run of a mask decoder engine takes; a session runs more of them in turns."""
_TIMINGS = "timings.cache"
_USUAL_PROMPTS, _USUAL_TEXT, _USUAL_BLOCK = 4, 16, 64
_FEATURES = ("image_features", "high_res_0", "high_res_1")
_ROOT = Path(__file__).resolve().parents[1]

Progress = Callable[[str], None]


def choose(target: str, precision: str, options: Sequence[str] = ()) -> tuple[TensorRT, str]:
    """The library, and ``target`` with "current" resolved; everything that can be refused at once is.

    Raises:
        UsageError: this library cannot build for the target, at the precision or with the options.
        EngineError: no TensorRT here, or no GPU for "current".
    """
    require_precision(precision)
    library = tensorrt_library.find()
    present = None
    if target == CURRENT or not library.is_rtx:
        try:
            present = current_device().target
        except EngineError as error:
            if target == CURRENT:
                raise EngineError(
                    f"{error}; --target current needs a GPU: name one, as in --target sm_89"
                ) from None
    aim = present if target == CURRENT and present else target
    library.require_target(aim, present)
    if precision == "fp8" and int(aim.removeprefix("sm_")) < LEAST_TARGET:
        told = f"sm_{LEAST_TARGET} and newer GPUs multiply in fp8, {aim} does not"
        raise UsageError(f"{told}: choose another --precision")
    for option in options:
        library.require_option(option)
    return library, aim


def add_engines(
    bundle: Path,
    target: str,
    precision: str,
    *,
    options: Sequence[str] = (),
    progress: Progress,
) -> dict[str, Built]:
    """Build an engine of every role for ``target`` ("sm_89") at ``precision`` and put them into ``bundle``.

    ``progress`` is told of every step by a line of text, and once with the name of a role when it is done.

    Raises:
        BundleError: no bundle, changed files, or no graphs to compile. EngineError: a build failed.
    """
    manifest = Manifest.load(bundle)
    roles = manifest.engine_roles
    sources = {role: source_of(manifest, role, precision) for role in roles}
    for source in dict.fromkeys(sources.values()):
        manifest.verify(bundle, source)
    if OPTION in options:
        require_attention(bundle / manifest.paths(sources["mask_decoder"])["mask_decoder"])
    ranges = calibrated(bundle, progress) if precision == "fp8" else {}
    with atomic_directory(bundle, marker=MANIFEST) as part:
        link_files(bundle, part)
        folder = part / "engines" / target
        folder.mkdir(parents=True, exist_ok=True)
        built, entries, written = {}, [], {f"engines/{target}/{_TIMINGS}"}
        for role in roles:
            name = f"engines/{target}/{role}.{precision}"
            for made in (f"{name}.engine", f"{name}.layers.json"):
                (part / made).unlink(missing_ok=True)  # not to write into the old bundle through the link
                written.add(made)
            job = make_job(manifest, part, role, target, precision, f"{name}.engine", options)
            job = dataclasses.replace(job, ranges=ranges.get(graph_role(role), {}))
            built[role] = run(job, partial(_tell, progress, f"{role} {target}: "))
            write_json(part / f"{name}.layers.json", dataclasses.asdict(built[role]))
            entries.append(_entry(manifest, part, job, built[role], role, precision, options))
            progress(role)
        if ranges:
            name = f"engines/{target}/{precision}.ranges.json"
            (part / name).unlink(missing_ok=True)
            write_json(part / name, ranges)
            written.add(name)
        replaced = {(entry.target, entry.precision, entry.role) for entry in entries}
        kept = [e for e in manifest.engines if (e.target, e.precision, e.role) not in replaced]
        files = held_files(part, manifest, written)
        dataclasses.replace(manifest, files=files, engines=(*kept, *entries)).save(part)
    return built


def make_job(
    manifest: Manifest,
    root: Path,
    role: str,
    target: str,
    precision: str,
    engine: str,
    options: Sequence[str] = (),
) -> Job:
    """How the engine of ``role`` is built; ``engine`` is its name below ``root``."""
    held = manifest.paths(source_of(manifest, role, precision))[role]
    job = job_of(root / held, root / engine, role, target, precision, manifest.shapes, options)
    timings = (root / "engines" / target / _TIMINGS).absolute()
    return dataclasses.replace(job, timings=str(timings))


def job_of(
    graph: Path,
    engine: Path,
    role: str,
    target: str,
    precision: str,
    shapes: Shapes,
    options: Sequence[str] = (),
) -> Job:
    """How ``graph``, the one of ``role``, becomes the file ``engine``."""
    carried: tuple[str, ...] = ()
    fixed = {"B": 1} if role == "image_encoder" else {}  # the session encodes one image at a time
    if role == "decoder":
        # The session reads one conversation at a time.
        fixed, layers = {"L": shapes.max_length, "W": 1}, range(shapes.layers)
        carried = tuple(f"{k}_cache{out}_{i}" for i in layers for k in "kv" for out in ("", "_out"))
    elif role in ("image_encoder", "mask_decoder"):
        carried = _FEATURES
    return Job(
        source=str(graph.absolute()),
        engine=str(engine.absolute()),
        target=target,
        precision=role_precision(role, precision),
        carried=carried,
        fixed=fixed,
        profiles=profiles(role, shapes),
        options=tuple(options),
    )


def role_precision(role: str, precision: str) -> str:
    """int8 and int4 are the decoder's weights, which every token reads; the other graphs stay fp16."""
    return arithmetic(precision) if precision in ("int8", "int4") and role != "decoder" else precision


def graph_role(role: str) -> str:
    """The role of ROLES whose weights ``role`` has: vision towers for further image sizes share theirs."""
    return "vision" if role.startswith("vision") else role


def source_of(manifest: Manifest, role: str, precision: str) -> str:
    """The bundle's precision whose graph of ``role`` is compiled at ``precision``.

    A public MLLM's graphs may have the engine's type already, or weights that are as the engine holds them;
    else the fp32 graph is typed. int8 graphs of models trained here suit onnxruntime alone.

    Raises:
        BundleError: the bundle holds none that can be compiled so.
    """
    typed = f"decoder{WEIGHTS}" in manifest.paths()
    if graph_role(role) in ("vision", "decoder"):
        wanted = [role_precision(role, precision), arithmetic(precision)] if typed else []
    else:  # the segmenter's are in fp32 beside every floating MLLM
        wanted = [name for name in manifest.precisions if FORMATS[name].segmenter == "fp32"]
    if precision == "fp8":
        wanted = []  # calibrated on the fp32 graphs, whose matrices it rounds
    for name in (*wanted, "fp32"):
        if name in manifest.precisions:
            return name
    asked = dict.fromkeys((*manifest.precisions, *(formats_for(precision) if typed else ("fp32",))))
    raise BundleError(
        f"this bundle holds no graph of the {role.replace('_', ' ')} to compile at {precision} (it has "
        f"{', '.join(manifest.precisions)}): build it again with --force --precision {','.join(asked)}"
    )


def formats_for(precision: str) -> tuple[str, ...]:
    """Precisions of a bundle around a public MLLM that its engines at ``precision`` are compiled from."""
    return ("fp32",) if precision == "fp8" else tuple(dict.fromkeys((precision, arithmetic(precision))))


def calibrated(bundle: Path, progress: Progress) -> dict[str, dict[str, float]]:
    """`calibration.calibrate`, which loads onnxruntime and renders scenes: for fp8 alone."""
    from export.calibration import calibrate

    return calibrate(bundle, progress)


def profiles(role: str, shapes: Shapes) -> tuple[dict[str, Range], ...]:
    """Optimization profiles: the decoder's first is the single token, its second is a block of any length."""
    if role == "decoder":
        most = shapes.max_length
        # One conversation at a time on a whole cache, also where the graph leaves both to the host.
        common = {"L": (most, most, most), "W": (1, 1, 1)}
        return {"S": (1, 1, 1), **common}, {"S": (1, min(_USUAL_BLOCK, most), most), **common}
    if role == "mask_decoder":
        text = (1, min(_USUAL_TEXT, shapes.max_text), shapes.max_text)
        return ({"N": (1, _USUAL_PROMPTS, MAX_PROMPTS), "T": text},)
    return ()


def run(job: Job, progress: Progress) -> Built:
    """Run ``job`` in a process of its own, which ends with this one's interruption.

    Raises:
        EngineError: it failed, or the process died.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, sys.path)])}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        tempfile.TemporaryDirectory(prefix="ppcr-engine-") as links,
    ):
        if OPTION in job.options:
            environment |= parser_environment(Path(links))
        process = subprocess.Popen(
            [sys.executable, "-m", "export.engine_job"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=environment,
        )  # fmt: skip
        answer: dict[str, object] = {}
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(dataclasses.asdict(job)))
            process.stdin.close()
            for line in process.stdout:
                answer = json.loads(line)
                if "phase" in answer:
                    progress(f"{answer['phase']} {answer['step']}/{answer['of']}")
            process.wait()
        finally:
            process.kill()
            process.wait()
        if "built" in answer:
            return Built.from_dict(answer["built"])  # type: ignore[arg-type]
        said.seek(0)
        last = said.read().strip().splitlines()[-1:]
    told = answer.get("error") or f"the build ended with exit code {process.returncode}"
    raise EngineError(str(told) if "error" in answer or not last else f"{told}: {last[0]}")


def _tell(progress: Progress, head: str, step: str) -> None:
    progress(head + step)


def _entry(
    manifest: Manifest, part: Path, job: Job, built: Built, role: str, precision: str, options: Sequence[str]
) -> EngineEntry:
    onnx = manifest.paths(source_of(manifest, role, precision))[role]
    return EngineEntry(
        role=role,
        target=job.target,
        precision=precision,
        file=Path(job.engine).relative_to(part.absolute()).as_posix(),
        onnx=onnx,
        onnx_sha256=manifest.files[onnx].sha256,
        flavour=built.flavour,
        version=built.version,
        options=tuple(options),
        bytes_on_gpu=built.activation_bytes + built.weight_bytes,
    )
