"""A cold start, step by step: import the runtime, load a bundle, first mask. Prints one JSON line.

Run in a fresh process by the latency benchmark: ``cold.py BUNDLE CHECKPOINT ENGINE PRECISION THREADS IMAGE
EXPRESSION``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])


def main(
    bundle: str, checkpoint: str, engine: str, precision: str, threads: str, image: str, expression: str
) -> int:
    """Print the seconds of each step, and whether torch was loaded on the way."""
    start = time.perf_counter()
    import runtime.pipeline

    imported = time.perf_counter()
    pipeline = runtime.pipeline.Pipeline.load(
        bundle, precision=precision, threads=int(threads), engine=engine, checkpoint=checkpoint
    )
    loaded = time.perf_counter()
    pipeline.open(image).segment(expression)
    answered = time.perf_counter()
    steps = {"import_s": imported - start, "load_s": loaded - imported, "first_mask_s": answered - loaded}
    print(json.dumps({**steps, "torch_loaded": "torch" in sys.modules}), flush=True)
    return 0


if __name__ == "__main__":
    from ppcr.errors import run_cli

    sys.exit(run_cli(lambda: main(*sys.argv[1:])))
