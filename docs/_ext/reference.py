"""Pages that are read from the code: `<!-- generated: NAME -->` in a page becomes Markdown here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flexlora.experiment.forms import taken

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
    told = taken(field)
    return told if len(told) < 90 else "several forms"


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
    from flexlora.federation.plans import FOUR_TYPES
    from flexlora.federation.ranks import assign, count

    ids = [str(i) for i in range(1506)]
    head = ["`lora.r`", "8", "30", "30/200", "200"]
    rows = [head, ["---"] * len(head)]
    for name in ("uniform", "normal", *FOUR_TYPES, "homogeneous"):
        counted = count(assign(ids, name, seed=0))
        rows.append([f"`{name}`", *(f"{counted.get(t, 0)}" for t in head[1:])])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def verbs() -> str:
    """The help of every verb, as the terminal shows it."""
    from typer.testing import CliRunner

    from flexlora.cli import app

    parts, terminal = [], CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1"})
    for command in app.registered_commands:
        assert command.callback
        name = command.callback.__name__
        text = terminal.invoke(app, [name, "--help"]).output
        lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
        parts.append(f"## `flexlora {name}`\n\n```text\n{lines}\n```\n")
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
