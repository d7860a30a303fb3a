"""Pages that are read from the code: `<!-- generated: NAME -->` in a page becomes Markdown here."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

FURTHER = ("aggregation", "simulator", "comparison", "deploy")
MARKER = re.compile(r"<!-- generated: (\w+) -->")


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", fill)
    app.connect("env-get-outdated", generated)
    return {"parallel_read_safe": True}


def generated(app: Any, env: Any, *pages: set[str]) -> list[str]:
    """Pages to build again although their source is as it was: the code may have changed."""
    return [p for p in env.found_docs if MARKER.search(Path(env.doc2path(p)).read_text("utf-8"))]


def fill(app: Any, page: str, source: list[str]) -> None:
    """Replace every marker of a page."""
    source[0] = MARKER.sub(lambda found: PARTS[found[1]](), source[0])


def configuration() -> str:
    """Every section of the schema, every key with its type, default and description."""
    from flexlora.experiment.config import Config

    return "\n".join(_section("", Config))


def _section(path: str, model: type[BaseModel]) -> Iterator[str]:
    below: list[tuple[str, type[BaseModel]]] = []
    if path:
        yield f"\n## `{path}`\n\n{_line(model.__doc__)}\n"
    for name, field in model.model_fields.items():
        dotted = f"{path}.{name}" if path else name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            below.append((dotted, field.annotation))
            if path:
                yield (
                    f"`{name}`\n: section [`{dotted}`](#{dotted.replace('.', '')}). "
                    + _line(field.description)
                    + "\n"
                )
        else:
            about = f"{_type(field)}; default {_default(field)}. {_line(field.description)}"
            yield f"`{name}`\n: {about}\n"
    for dotted, section in below:
        yield from _section(dotted, section)


def _type(field: FieldInfo) -> str:
    kind: Any = field.annotation
    told = readable(Annotated[kind, *field.metadata] if field.metadata else kind)
    return told if len(told) < 90 else "several forms"


def readable(kind: Any) -> str:
    """A type as people read it.

    >>> readable(tuple[int, ...] | None), readable(Literal["a", "b"])
    ('list of whole number or nothing', '`a`, `b`')
    """
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = (_bound(m) for m in inside[1:])
        return " ".join([readable(inside[0]), *(b for b in bounds if b)])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(readable(part) for part in inside)
    if origin is tuple:
        return f"list of {readable(inside[0])}"
    if origin is dict:
        return f"mapping from {readable(inside[0])} to {readable(inside[1])}"
    return {
        int: "whole number", float: "number", str: "text", bool: "`true` or `false`",
        type(None): "nothing",
    }.get(kind, str(kind))  # fmt: skip


def _bound(rule: Any) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return ", ".join(f"{w} {getattr(rule, k)}" for k, w in words.items() if hasattr(rule, k))


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}):
        return "none"
    if isinstance(value, tuple):
        return ", ".join(f"`{v}`" for v in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def methods() -> str:
    """The table of methods, and each one's settings and source."""
    from flexlora.experiment.catalogue import catalogue
    from flexlora.methods import methods as factories

    head = ["method", "clients train", "floats up", "floats down", "mixed ranks", "exact",
            "linear", "cross-device"]  # fmt: skip
    rows, notes = [head, ["---"] * len(head)], []
    for name, about in catalogue()["methods"].items():
        m = factories[name]()
        told = [_mark(v) for v in (m.mixed_ranks, m.exact, m.linear, m.stateless)]
        rows.append([f"`{name}`", m.trains, _code(m.up), _code(m.down), *told])
        settings = ", ".join(f"`{k}` = `{_short(v)}`" for k, v in about["settings"].items())
        summary = _line((factories[name].__doc__ or "").split("\n\n")[0])
        notes.append(f"`{name}`\n: {summary} {_settings(settings)} Source: {m.citation}.\n")
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return table + "\n\n## Rule, settings, source\n\n" + "\n".join(notes)


def _settings(text: str) -> str:
    return f"Settings: {text}." if text else "No settings."


def _code(text: str) -> str:
    return f"`{text}`" if text else "0"


def _mark(value: bool) -> str:
    return "yes" if value else "no"


def loaders() -> str:
    """Every data loader with its settings."""
    from flexlora.experiment.catalogue import catalogue

    lines = []
    for kind, settings in catalogue()["data"].items():
        told = (
            f"`{k}`" + (f" = `{_short(v)}`" if v else " (required)") for k, v in settings.items()
        )
        lines.append(f"`{kind}`\n: {', '.join(told)}\n")
    return "\n".join(lines)


def _short(text: str) -> str:
    return {"None": "none"}.get(text, text.strip("'")) if len(text) < 40 else "..."


def ranks() -> str:
    """Clients of 1,506 at each of the paper's types, for every distribution by name."""
    from flexlora.federation.ranks import FOUR_TYPES, assign, count

    ids = [str(i) for i in range(1506)]
    head = ["`lora.r`", "8", "30", "30/200", "200"]
    rows = [head, ["---"] * len(head)]
    for name in ("uniform", "normal", *FOUR_TYPES, "homogeneous"):
        counted = count(assign(ids, name, seed=0))
        rows.append([f"`{name}`", *(f"{counted.get(t, 0)}" for t in head[1:])])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def verbs() -> str:
    """The help of every verb, as the terminal shows it."""
    import typer

    from flexlora.cli import app

    group: Any = typer.main.get_command(app)
    parts, program = [], group.make_context("flexlora", [], resilient_parsing=True)
    for name, command in group.commands.items():
        context = command.make_context(name, [], program, resilient_parsing=True)
        text = command.get_help(context).replace("\\[", "[")
        parts.append(f"## `flexlora {name}`\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def names() -> str:
    """What `import flexlora` gives."""
    import flexlora

    return ", ".join(f"`{name}`" for name in flexlora.__all__)


def further() -> str:
    """A table of contents of the pages on single rooms, those that there are."""
    there = [p for p in FURTHER if (Path(__file__).parents[1] / f"{p}.md").is_file()]
    lines = ["```{toctree}", ":caption: Further", ":maxdepth: 1", "", *there, "```"]
    return "\n".join(lines) if there else ""


PARTS: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "further": further,
    "loaders": loaders,
    "methods": methods,
    "names": names,
    "ranks": ranks,
    "verbs": verbs,
}
