"""Server rules: one file per paper, and the plain dict from name to factory."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Literal, get_args, get_origin, get_type_hints

from flexlora.federation.state import Method
from flexlora.methods.fedavg import fedavg, fedit
from flexlora.methods.flexlora import flexlora, flexlora_released

methods: dict[str, Callable[..., Method]] = {
    "fedavg": fedavg,
    "fedit": fedit,
    "flexlora": flexlora,
    "flexlora-released": flexlora_released,
}
"""Name, as users write it -> factory; its keyword arguments are the method's settings."""


def make(name: str, **settings: object) -> Method:
    """A method by name, with its settings.

    Raises:
        ValueError: an unknown method or setting; names the nearest one.

    >>> make("flexlora", split="balanced").name
    'flexlora'
    >>> make("flexlorra")
    Traceback (most recent call last):
    ValueError: unknown method 'flexlorra'; did you mean 'flexlora'?
    """
    if name not in methods:
        raise ValueError(f"unknown method {name!r}; {_nearest(name, methods)}")
    known = get_type_hints(methods[name])
    known.pop("return", None)
    for setting, value in settings.items():
        if setting not in known:
            nearest = _nearest(setting, known)
            raise ValueError(f"method {name!r} has no setting {setting!r}; {nearest}")
        choices = get_args(known[setting]) if get_origin(known[setting]) is Literal else ()
        if choices and value not in choices:
            raise ValueError(f"method {name!r}: {setting} is {value!r}; expected one of {choices}.")
    return methods[name](**settings)


def _nearest(word: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"it has {sorted(known)}." if known else "it has none."
