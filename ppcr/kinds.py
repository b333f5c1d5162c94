"""Data classes made of JSON: arrays become tuples, and every value has the kind that its field declares."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

_T = TypeVar("_T")


def read_fields(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """The data class ``kind`` made of a JSON object's values.

    Raises:
        TypeError: fields are missing, unknown or of another kind.
    """
    return require_kinds(kind(**{name: _frozen(value) for name, value in values.items()}))


def require_kinds(made: _T) -> _T:
    """``made``, a data class, whose values have the kinds that its fields declare. Raises TypeError."""
    declared: Any = type(made)
    for name, kind in _kinds(declared).items():
        value = getattr(made, name)
        if not _fits(value, kind):
            raise TypeError(f"{name} is {reprlib.repr(value)}, not {_told(kind)}")
    return made


_kinds = cache(get_type_hints)


def _fits(value: object, kind: Any) -> bool:
    """Whether a value is of a kind such as ``float``, ``tuple[int, ...]``, ``dict[str, int]`` or a union."""
    if kind is Any:
        return True
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is tuple and isinstance(value, tuple):
        wanted = inside[:1] * len(value) if inside[-1] is Ellipsis else inside
        return len(value) == len(wanted) and all(map(_fits, value, wanted))
    if origin is dict and isinstance(value, dict):
        return all(_fits(key, inside[0]) and _fits(held, inside[1]) for key, held in value.items())
    return origin is None and isinstance(value, kind)


def _told(kind: Any) -> str:
    """A kind in words of JSON: "a whole number", "2 numbers"."""
    inside = get_args(kind)
    if get_origin(kind) is tuple and inside[-1] is not Ellipsis:
        return f"{len(inside)} numbers" if set(inside) <= {int, float} else f"{len(inside)} values"
    words = {bool: "true or false", float: "a number", int: "a whole number", str: "text"}
    return words.get(kind) or {dict: "an object", tuple: "a list"}.get(get_origin(kind), "what is expected")


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
