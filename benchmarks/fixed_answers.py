"""Answers of fixed lengths, for weights that say nothing: a usual semantic prompt, and one box.

The weights' values do not change what a step costs; how many steps there are, they would. Under these
constraints every row takes the same steps, and those of a usual answer.
"""

from __future__ import annotations

from ppcr.constraint import Choice, Constraint, Free, Literal, Number, Segment
from ppcr.tokenizer import PromptTokenizer

LENGTHS = (1, 2, 5)
"""Tokens of category, attributes and relation: "sphere; small red; left of the green cube"."""
TARGETS, DIGITS = 1, 3


def fix_answers(tokenizer: PromptTokenizer) -> None:
    """Hold both stages of ``tokenizer`` to one target and to fixed numbers of tokens."""
    fields = _fixed(tokenizer.semantic_constraint, LENGTHS).segments[:-1]
    semantic = Constraint((*fields, Literal((tokenizer.count_tokens[TARGETS],))))
    spatial = _fixed(tokenizer.spatial_constraint(TARGETS), ())
    # Both are looked up on the instance first; the class stays as it is.
    vars(tokenizer)["semantic_constraint"] = semantic
    vars(tokenizer)["spatial_constraint"] = lambda count: spatial


def _fixed(constraint: Constraint, lengths: tuple[int, ...]) -> Constraint:
    """The same fields: free ones of ``lengths`` tokens in turn, numbers of `DIGITS`, each with its stop."""
    segments: list[Segment] = []
    left = list(lengths)
    for segment in constraint.segments:
        if isinstance(segment, Free):
            count = DIGITS if isinstance(segment, Number) else left.pop(0)
            segments += [Choice(segment.tokens)] * count + [Literal((segment.stop,))]
        else:
            segments.append(segment)
    return Constraint(tuple(segments))
