"""Keyword settings checked by signature, and the wording that all data errors share."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class SettingError(ValueError):
    """A key that nobody knows or that is missing: a matter of the configuration, not the data."""


def call(
    function: Callable[..., T], settings: Mapping[str, object], where: str, *given: object
) -> T:
    """`function(*given, **settings)`, after its signature has accepted the names.

    >>> call(lambda rows, seed=0: rows + seed, {"sed": 1}, "partition", 2)
    Traceback (most recent call last):
    flexlora.data.settings.SettingError: unknown key 'partition.sed'; did you mean 'seed'?

    Raises:
        SettingError: a setting it does not take, with the nearest one; or one that is missing.
    """
    parameters = list(inspect.signature(function).parameters.values())[len(given) :]
    known = [p.name for p in parameters]
    for name in settings:
        if name not in known:
            close = _closest(name, known)
            hint = f"did you mean {close!r}?" if close else f"known: {', '.join(known)}."
            raise SettingError(f"unknown key '{where}.{name}'; {hint}")
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in settings]
    if missing:
        raise SettingError(
            f"{where}.{missing[0]}: not set; expected one. Known: {', '.join(known)}."
        )
    return function(*given, **settings)


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean '...'?)` where a known name is near, otherwise nothing.

    >>> nearest("iput", ["input", "output"]), nearest("xyz", ["input"])
    (" (did you mean 'input'?)", '')
    """
    close = _closest(name, known)
    return f" (did you mean {close!r}?)" if close else ""


def _closest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def few(names: Iterable[object], limit: int = 5) -> str:
    """The first names of a list that may be long.

    >>> few(range(7))
    '0, 1, 2, 3, 4 and 2 more'
    """
    listed = [str(name) for name in names]
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest
