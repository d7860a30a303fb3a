"""Server rules: one file per paper, and the plain dict from name to factory."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Literal, get_args, get_origin, get_type_hints

from flexlora.federation.state import Method
from flexlora.methods.fedavg import fedavg, fedit
from flexlora.methods.fedex_lora import fedex_lora
from flexlora.methods.fedopt import fedadam, fedavgm
from flexlora.methods.fedprox import fedprox
from flexlora.methods.fedsa_lora import fedsa_lora
from flexlora.methods.ffa_lora import ffa_lora
from flexlora.methods.flexlora import flexlora, flexlora_released
from flexlora.methods.flora import flora
from flexlora.methods.full import full
from flexlora.methods.hetlora import hetlora
from flexlora.methods.memory import flexlora_memory
from flexlora.methods.raflora import raflora
from flexlora.methods.rbla import rbla
from flexlora.methods.rolora import rolora
from flexlora.methods.slora import slora

__all__ = ["make", "methods"]

methods: dict[str, Callable[..., Method]] = {
    "flexlora": flexlora,
    "flexlora-released": flexlora_released,
    "flexlora-memory": flexlora_memory,
    "fedavg": fedavg,
    "fedit": fedit,
    "hetlora": hetlora,
    "rbla": rbla,
    "raflora": raflora,
    "flora": flora,
    "ffa-lora": ffa_lora,
    "rolora": rolora,
    "fedsa-lora": fedsa_lora,
    "fedex-lora": fedex_lora,
    "slora": slora,
    "fedprox": fedprox,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "full": full,
}
"""Name, as users write it -> factory; its keyword arguments are the method's settings."""


def make(name: str, **settings: object) -> Method:
    """A method by name, with its settings; a wrapper's `of` is a name, or a mapping with one.

    Raises:
        ValueError: an unknown method or setting; names the nearest one.

    >>> make("flexlora", split="balanced").name
    'flexlora'
    >>> make("fedprox", of={"name": "flexlora", "split": "A"}, mu=0.1).name
    'fedprox(flexlora)'
    >>> make("flexlorra")
    Traceback (most recent call last):
    ValueError: unknown method 'flexlorra'; did you mean 'flexlora'?
    """
    if name not in methods:
        raise ValueError(f"unknown method {name!r}; {_nearest(name, methods)}")
    known = get_type_hints(methods[name])
    known.pop("return", None)
    if "of" in settings and "of" in known:
        settings["of"] = _wrapped(name, settings["of"])
    for setting, value in settings.items():
        if setting not in known:
            nearest = _nearest(setting, known)
            raise ValueError(f"method {name!r} has no setting {setting!r}; {nearest}")
        choices = get_args(known[setting]) if get_origin(known[setting]) is Literal else ()
        if choices and value not in choices:
            raise ValueError(f"method {name!r}: {setting} is {value!r}; expected one of {choices}.")
    return methods[name](**settings)


def _wrapped(wrapper: str, of: object) -> Method:
    """What a wrapper wraps: a method, `flexlora`, or `{name: flexlora, split: balanced}`."""
    if isinstance(of, Method):
        return of
    settings = {"name": of} if isinstance(of, str) else dict(of) if isinstance(of, Mapping) else {}
    if "name" not in settings:
        raise ValueError(f"{wrapper}: 'of' is {of!r}; it needs a name, or a mapping with a name.")
    return make(**settings)


def _nearest(word: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"it has {sorted(known)}." if known else "it has none."
