"""What a configuration's field takes, in words: for its reference and for errors."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

NAMES: dict[Any, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "`true` or `false`",
    type(None): "nothing",
}


def taken(field: FieldInfo) -> str:
    """What a field takes, its bounds included."""
    kind: Any = field.annotation
    return readable(Annotated[kind, *field.metadata] if field.metadata else kind)


def branches(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, without None; a type that is none is its only one."""
    inside = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return tuple(part for part in inside if part is not type(None))


def readable(kind: Any) -> str:
    """A type as people read it.

    >>> readable(tuple[int, ...] | None), readable(Literal["a", "b"])
    ('list of whole number or nothing', '`a`, `b`')
    """
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = " and ".join(b for rule in inside[1:] for b in _bounds(rule))
        return " ".join(filter(None, (readable(inside[0]), bounds)))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(readable(part) for part in inside)
    if origin is tuple:
        return f"list of {readable(inside[0])}"
    if origin is dict:
        return f"mapping from {readable(inside[0])} to {readable(inside[1])}"
    return NAMES.get(kind, str(kind))


def _bounds(rule: Any) -> list[str]:
    """Of one Field or of one of annotated-types' markers.

    >>> from pydantic import Field
    >>> readable(Annotated[float, Field(gt=0, le=1)])
    'number above 0 and at most 1'
    """
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    rules = getattr(rule, "metadata", [rule])
    return [f"{w} {getattr(r, k)}" for r in rules for k, w in words.items() if hasattr(r, k)]
