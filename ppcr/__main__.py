"""``python -m ppcr`` is the installed ``ppcr`` command."""

from __future__ import annotations

from ppcr.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
