"""What a configuration can name: methods, data loaders, rank distributions, trackers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args

from flexlora.data.load import LOADERS
from flexlora.experiment.build import BOUNDS
from flexlora.experiment.config import Tracker
from flexlora.federation.ranks import NAMES
from flexlora.federation.state import Method
from flexlora.methods import make, methods


def catalogue() -> dict[str, Any]:
    """Everything by kind; methods with what is true of them."""
    return {
        "methods": {name: _method(factory) for name, factory in methods.items()},
        "bounds": list(BOUNDS),
        "data": {kind: _settings(loader) for kind, loader in LOADERS.items()},
        "ranks": list(NAMES),
        "report_to": list(get_args(Tracker)),
    }


def _method(factory: Callable[..., Method]) -> dict[str, Any]:
    settings = _settings(factory)
    required = [
        p.name for p in inspect.signature(factory).parameters.values() if p.default is p.empty
    ]
    about: dict[str, Any] = {"settings": settings, "wraps": "of" in settings}
    if set(required) <= {"of"}:
        # what is true of a wrapper is told around FedIT, whose basis every one of them can take
        method = factory(**dict.fromkeys(required, make("fedit")))
        about |= {
            "mixed_ranks": method.mixed_ranks,
            "exact": method.exact,
            "linear": method.linear,
            "stateless": method.stateless,
            "trains": method.trains,
            "up": method.up,
            "down": method.down,
            "citation": method.citation,
        }
    return about


def _settings(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: None if p.default is p.empty else repr(p.default)[:60] for p in parameters}


def describe(found: Mapping[str, Any]) -> str:
    """The same for people."""
    lines = ["methods (method.name)"]
    for name, about in found["methods"].items():
        mixed = "mixed ranks" if about.get("mixed_ranks") else "one rank for all"
        settings = ", ".join(f"{k}={v}" for k, v in about["settings"].items())
        lines.append(f"  {name:20} {mixed:17} {settings}")
        if about.get("citation"):
            lines.append(f"  {'':20} {about['citation']}")
    lines += [f"  {name:20} a bound, not a method" for name in found["bounds"]]
    lines += ["", "data (data.kind)"]
    for kind, settings in found["data"].items():
        lines.append(f"  {kind:20} {', '.join(settings)}")
    lines += ["", f"ranks (lora.r)        {', '.join(found['ranks'])}, or any mixture"]
    lines += [f"trackers (report_to)  {', '.join(found['report_to'])}"]
    lines += ["", "Methods and loaders may also be named by import path: package.module:function"]
    return "\n".join(lines)
