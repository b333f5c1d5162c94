"""The glossary of the scenes' grammar (`ppcr.drafts`): every wording and the canonical words it stands for.

``python -m ppcr.data.glossary`` writes it beside the shipped checkpoint, which is trained on this grammar.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from ppcr.checkpoint import SHIPPED
from ppcr.data.grammar import ADJECTIVES, BINARY, LEADING, NOUNS, RANK_WORDS, TRAILING
from ppcr.data.relations import BETWEEN, FIELDS, SIDES
from ppcr.drafts import AND, CATEGORY, NOT, ORDER, RANK, RELATION, SIDE, SKIP, Glossary
from ppcr.errors import run_cli
from ppcr.manifest import DRAFTS

_ANYTHING = "object"
_SEVERAL = ("all", "both", "every", "each", "any", "everything", "anything", "ones")


def glossary() -> Glossary:
    """Of all that `ppcr.data.grammar` can say."""
    kinds = tuple(name for name, _ in FIELDS if name != "shape")
    return Glossary(
        attributes=kinds,
        wordings=tuple(dict.fromkeys(_wordings())),
        several=(*_SEVERAL, *(many for nouns in NOUNS.values() for _, many in nouns)),
        pairs=(BETWEEN,),
        anything=_ANYTHING,
    )


def _wordings() -> Iterator[tuple[str, str, str]]:
    for kind, values in FIELDS:
        for value in values if kind != "shape" else ():
            yield from ((kind, value, wording) for wording in ADJECTIVES.get(value, (value,)))
    for shape, nouns in NOUNS.items():
        yield from ((CATEGORY, shape or _ANYTHING, noun) for forms in nouns for noun in forms)
    yield from ((CATEGORY, _ANYTHING, word) for word in ("one", "ones", "everything", "anything"))
    for relation, wordings in BINARY.items():
        yield from ((RELATION, relation, _bare(wording)) for wording in wordings)
    for wordings_of in (LEADING, TRAILING):
        for order, wordings in wordings_of.items():
            yield from ((ORDER, order, _bare(wording)) for wording in wordings)
    for rank, words in RANK_WORDS.items():
        yield from ((RANK, rank, word) for word in words)
    yield from ((SIDE, f"from {side}", f"from {side}") for side in SIDES)
    yield from ((NOT, "not", "not"), (AND, "and", "and"))
    yield SKIP, "", "can you"  # else its first word would be a cylinder


def _bare(wording: str) -> str:
    return wording.replace("the ", "")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m ppcr.data.glossary``; returns the exit code."""
    return run_cli(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="ppcr.data.glossary", description="Write the grammar's glossary.")
    parser.add_argument("--output", type=Path, default=SHIPPED / DRAFTS, metavar="FILE")
    path: Path = parser.parse_args(argv).output
    glossary().save(path)
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
