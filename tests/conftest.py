"""Shared fixtures: where things lie, one bundle a session, and settings that keep two cores enough."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from runtime.bundle import Bundle
from runtime.processor import has_bf16
from runtime.session import Sessions, load_sessions

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "ppcr" / "assets"
SHARED = Path(os.environ.get("PPCR_SHARED", ROOT.parent / "shared"))

# A shell's background jobs ignore Ctrl-C, and so would the commands that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The models are so small that more threads only make them wait for each other.
torch.set_num_threads(1)

settings.register_profile("ppcr", deadline=None, derandomize=True, max_examples=50, print_blob=True)
settings.load_profile("ppcr")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root, from which the scripts run."""
    return ROOT


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The shipped `ppcr-tiny` checkpoint."""
    return ASSETS / "ppcr-tiny"


@pytest.fixture(scope="session")
def samples() -> Path:
    """The shipped sample images with their `samples.json`."""
    return ASSETS / "samples"


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo bundle, built once a session by the command a user runs.

    PPCR_TEST_BUNDLE names one already built, to shorten the wait while working on something else.
    """
    given = os.environ.get("PPCR_TEST_BUNDLE")
    if given:
        if not (Path(given) / "manifest.json").is_file():
            pytest.fail(f"PPCR_TEST_BUNDLE={given} holds no manifest.json")
        return Path(given)
    target = tmp_path_factory.mktemp("bundles") / "ppcr-tiny-cpu"
    command = [sys.executable, "export/build_engines.py", "--output", str(target)]
    built = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if built.returncode != 0:
        said = f"{built.stdout[-4000:]}\n{built.stderr[-4000:]}"
        pytest.fail(f"{' '.join(command)} exited {built.returncode}:\n{said}")
    return target


@pytest.fixture(scope="session")
def loaded(bundle: Path) -> Bundle:
    """The demo bundle in fp32."""
    return Bundle.load(bundle, precision="fp32")


@pytest.fixture(scope="session")
def half(loaded: Bundle) -> Sessions:
    """Its sessions on OpenVINO in bfloat16, on one thread."""
    if not has_bf16():
        pytest.skip("this processor has no bfloat16 instructions")
    return load_sessions("openvino", loaded, threads=1, precision="bf16")


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of photographs with human-written expressions (`triples.json`); not in the repository."""
    return _shared("photos", "triples.json")


@pytest.fixture(scope="session")
def weights() -> Path:
    """The folder of public weights (`mobile_sam.pt`); not in the repository."""
    return _shared("weights", "mobile_sam.pt")


def _shared(folder: str, file: str) -> Path:
    path = SHARED / folder
    if not (path / file).is_file():
        pytest.skip(f"{file} is not at {path} (it lies outside the repository; PPCR_SHARED says where)")
    return path
