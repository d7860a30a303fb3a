"""What a configuration can name: methods, data loaders, rank plans, trackers."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from flexlora.data.load import LOADERS
from flexlora.experiment.build import BOUNDS
from flexlora.experiment.config import Tracker
from flexlora.experiment.errors import Failure, nearest
from flexlora.federation.plans import INSTEAD, NAMES
from flexlora.federation.state import Method
from flexlora.methods import make, methods

HEAD = ("", "ranks", "exact", "linear", "stateless", "trains", "floats up", "floats down")
WIDTHS = (19, 7, 7, 8, 11, 21, 21, 23)
"""Of the table's columns: together below 120."""


def catalogue() -> dict[str, Any]:
    """Everything by kind; methods with what is true of them."""
    return {
        "methods": {name: _method(factory) for name, factory in methods.items()},
        "bounds": dict(BOUNDS),
        "data": {kind: _settings(loader) for kind, loader in LOADERS.items()},
        "ranks": list(NAMES),
        "ranks_instead": dict(INSTEAD),
        "report_to": list(get_args(Tracker)),
    }


def one_method(name: str) -> dict[str, Any]:
    """What the catalogue says of one method, with its description.

    Raises:
        Failure: no such method.
    """
    if name in BOUNDS:
        return {"name": name, "bound": BOUNDS[name]}
    if name not in methods:
        raise Failure(f"no method {name!r}; {nearest(name, [*methods, *BOUNDS])}")
    factory = methods[name]
    about = re.split(r"\n(?:Raises:|>>>)", inspect.getdoc(factory) or "")[0]
    paper = inspect.getdoc(inspect.getmodule(factory)) or ""
    return {"name": name, "about": about.strip(), "paper": paper, **_method(factory)}


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
    """The catalogue for people."""
    lines = ["methods (method.name); one in full, with settings and source: flexlora methods NAME"]
    lines += _row(HEAD)
    for name, about in found["methods"].items():
        lines += _row((name, *_truths(about)))
    for name, told in found["bounds"].items():
        lines.append(f"  {name:19}a bound, not a method: {told}")
    lines += ["", *_wrapped(
        "ranks: mixed: clients may differ, one: all train at the smallest. exact: the new weight "
        "is the average of the clients' updates before any truncation. linear: a secure sum could "
        "serve it. stateless: clients keep nothing between rounds, as cross-device needs. Floats "
        "are per adapted layer and round; r: the client's rank.", 2
    )]  # fmt: skip
    lines += ["", "data (data.kind) and its settings"]
    for kind, settings in found["data"].items():
        lines.append(f"  {kind:22}{', '.join(settings)}")
    lines += ["", "ranks (lora.r): a number, a mixture {8: 0.8, 32: 0.2}, a list, {client: rank},"]
    lines += ["  {module pattern: rank}, or a distribution over lora.types by name"]
    lines += _wrapped(", ".join(found["ranks"]), 2)
    for prefix, told in found["ranks_instead"].items():
        lines.append(f"  {prefix + 'NAME':22}{told}")
    lines += ["", f"trackers (report_to): {', '.join(found['report_to'])}"]
    lines += ["", "Methods and loaders may also be named by import path: package.module:function"]
    return "\n".join(lines)


def describe_method(found: Mapping[str, Any]) -> str:
    """One method for people."""
    name = found["name"]
    if "bound" in found:
        return f"{name}: a bound, not a method: {found['bound']}"
    lines = [f"{name}: {found['about']}", "", *textwrap.indent(found["paper"], "  ").splitlines()]
    told = zip(HEAD[1:], _truths(found), strict=True)
    lines += ["", *(f"{head:14}{value}" for head, value in told)]
    settings = [f"{k} = {'required' if v is None else v}" for k, v in found["settings"].items()]
    lines += [f"{'settings':14}{', '.join(settings) or 'none'}"]
    return "\n".join([*lines, *_wrapped(f"{'source':14}{found['citation']}", 14)]).strip()


def _truths(about: Mapping[str, Any]) -> tuple[str, ...]:
    flags = ("exact", "linear", "stateless")
    words = ("trains", "up", "down")
    mixed = "mixed" if about["mixed_ranks"] else "one"
    yes = ("yes" if about[flag] else "no" for flag in flags)
    return (mixed, *yes, *(about[word] or "0" for word in words))


def _row(cells: Iterable[str]) -> list[str]:
    """A row of the table, as many lines as its longest cell needs."""
    folded = [
        textwrap.wrap(c, w - 2, break_on_hyphens=False) for c, w in zip(cells, WIDTHS, strict=True)
    ]
    height = max(len(cell) for cell in folded)
    lines = [[cell[n] if n < len(cell) else "" for cell in folded] for n in range(height)]
    return [
        ("  " + "".join(f"{c:{w}}" for c, w in zip(line, WIDTHS, strict=True))).rstrip()
        for line in lines
    ]


def _wrapped(text: str, indent: int) -> list[str]:
    first = " " * indent if indent == 2 else ""
    return textwrap.wrap(text, 112, initial_indent=first, subsequent_indent=" " * indent)
