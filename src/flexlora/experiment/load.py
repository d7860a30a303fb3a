"""A YAML file and `--a.b value` overrides into a checked :class:`Config`; errors say where."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from flexlora.data.load import LOADERS
from flexlora.experiment.config import Config, Open
from flexlora.experiment.errors import USAGE, Failure, nearest
from flexlora.experiment.forms import branches, readable
from flexlora.methods import methods

Checked = TypeVar("Checked", bound=BaseModel)
Where = dict[tuple[str, ...], str]
"""Dotted path of a key -> the place it was written."""


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `5e-5` is a number (YAML 1.1 wants `5.0e-5`), `on` is a word."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":bool", ":float"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|Inf)$|\.(nan|NaN)$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"true|True|false|False$"), list("tTfF")
)


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a file, with overrides on top.

    Args:
        source: a YAML file, or the name of a shipped recipe (`quickstart`).
        overrides: words as on a command line, `--training.learning_rate 5e-5` or `--a.b=value`.

    Raises:
        Failure: a missing file, YAML that cannot be read, an unknown key, a bad value.
    """
    raw, where, path = read_recipe(source, overrides)
    return validate(raw, where, path)


def read_recipe(
    source: str | Path, overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], Where, str]:
    """A recipe with overrides on top, unchecked: the data, the place of every key, the file.

    Raises:
        Failure: a missing file, YAML that cannot be read, words that are no overrides.
    """
    path = find_recipe(str(source))
    raw, where = read_yaml(path)
    for key, value in parse_overrides(overrides):
        place(raw, key, value)
        where[key] = f"--{'.'.join(key)}"
    return raw, where, str(path)


def find_recipe(name: str) -> Path:
    """A path, or the shipped recipe of that name.

    Raises:
        Failure: neither exists.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = recipes() | comparisons()
    stem = Path(name).stem
    if stem in shipped and name in (stem, f"{stem}.yaml", f"recipes/{stem}.yaml"):
        return shipped[stem]
    raise Failure(f"configuration {name!r} not found; expected a YAML file or a shipped recipe: "
                  f"{nearest(stem, shipped)}")  # fmt: skip


def recipes() -> dict[str, Path]:
    """Name -> path of the recipes of runs that ship with the package."""
    return {name: path for name, path in _shipped() if not name.startswith("compare-")}


def comparisons() -> dict[str, Path]:
    """The same for comparisons."""
    return {name: path for name, path in _shipped() if name.startswith("compare-")}


def _shipped() -> list[tuple[str, Path]]:
    folder = Path(str(resources.files("flexlora") / "recipes"))
    return [(p.stem, p) for p in sorted(folder.glob("*.yaml"))]


def read_yaml(path: Path) -> tuple[dict[str, Any], Where]:
    """The file's mapping, and the line of every key.

    Raises:
        Failure: not YAML, not a mapping, or a key written twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        loader = _Loader(text)
        node = loader.get_single_node()
        raw = loader.construct_document(node) if node else {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise Failure(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(raw, dict):
        raise Failure(f"{path}: holds a {type(raw).__name__}; expected sections such as 'model:'.")
    where: Where = {}
    for key, line in _keys(node, ()):
        if key in where:
            raise Failure(f"{path}:{line}: {'.'.join(key)} is set twice (before: {where[key]}).")
        where[key] = f"{path}:{line}"
    return raw, where


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """`(path of keys, value)` for each `--a.b value`; values are read as YAML.

    >>> list(parse_overrides(["--training.learning_rate", "5e-5", "--report_to=[wandb]"]))
    [(('training', 'learning_rate'), 5e-05), (('report_to',), ['wandb'])]

    Raises:
        Failure: a word that is no option, or an option without a value.
    """
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise Failure(
                f"unexpected argument {word!r}; overrides are written --section.key value."
            )
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise Failure(f"--{name}: no value; expected --{name} VALUE.")
            value = rest.pop(0)
        try:
            yield tuple(name.split(".")), yaml.load(value, Loader=_Loader)
        except yaml.YAMLError as error:
            raise Failure(f"--{name}: {value!r} is not readable as YAML: {error}") from error


def validate(
    raw: Mapping[str, Any],
    where: Where | None = None,
    source: str = "config",
    schema: type[Checked] = Config,  # type: ignore[assignment]
) -> Checked:
    """A checked configuration from plain data; `schema` is what it must be, a run's by default.

    Raises:
        Failure: lists every problem, each with its place and, for an unknown key, the nearest name.
    """
    try:
        found = schema.model_validate(raw)
    except ValidationError as error:
        lines: dict[str, str] = {}
        for problem in error.errors():  # a union complains once per branch; one line is enough
            dotted, line = _explain(dict(problem), raw, where or {}, source, schema)
            lines.setdefault(dotted, line)
        raise Failure("\n".join(lines.values()), USAGE) from error
    if isinstance(found, Config):
        _known_settings(found, where or {}, source)
    return found


def _known_settings(config: Config, where: Where, source: str) -> None:
    """The keys of the open sections must be settings of the loader and the method they name."""
    named: tuple[tuple[str, Open, Callable[..., Any] | None], ...] = (
        ("data", config.data, LOADERS.get(config.data.kind)),
        ("method", config.method, methods.get(config.method.name)),
    )
    for section, given, function in named:
        if function is None:  # a plugin, whose module is not imported yet; a bound; a wrong name
            continue
        known = [*inspect.signature(function).parameters, *type(given).model_fields]
        for key in given.settings:
            if key not in known:
                place = where.get((section, key), source)
                raise Failure(f"{place}: unknown key '{section}.{key}'; {nearest(key, known)}")


def _explain(
    error: Mapping[str, Any],
    raw: Mapping[str, Any],
    where: Where,
    source: str,
    schema: type[BaseModel],
) -> tuple[str, str]:
    """The dotted path of one problem, and the line that tells the user about it."""
    path = tuple(str(part) for part in error["loc"])
    model: Any = schema
    known: list[str] = []
    kind: Any = None
    for depth, part in enumerate(path):
        fields: dict[str, FieldInfo] = getattr(model, "model_fields", {})
        if fields and part not in fields and not issubclass(model, Open):
            known = list(fields)
            path = path[: depth + 1]
            break
        if part not in fields:
            path = path[:depth]  # what follows names a branch of a union, which nobody wrote
            break
        kind = fields[part].annotation
        model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    place = next((where[path[:n]] for n in range(len(path), 0, -1) if path[:n] in where), source)
    dotted = ".".join(path)
    if error["type"] == "extra_forbidden":
        return dotted, f"{place}: unknown key {dotted!r}; {nearest(path[-1], known)}"
    named = place == f"--{dotted}"  # an override: its place is its name
    what = place if named else f"{place}: {dotted or 'configuration'}"
    if len(branches(kind)) > 1:
        return dotted, f"{what}: expected {readable(kind)} (got {_at(raw, path)!r})."
    message = str(error["msg"]).removeprefix("Value error, ")
    return dotted, f"{what}: {message} (got {error['input']!r})."


def _at(raw: Any, path: Sequence[str]) -> Any:
    """What was written at a path."""
    for part in path:
        raw = raw.get(part) if isinstance(raw, Mapping) else None
    return raw


def _keys(node: Any, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            yield path, key.start_mark.line + 1
            yield from _keys(value, path)


def place(raw: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    """Set what a dotted path names, making the sections on the way."""
    for part in key[:-1]:
        below = raw.get(part)
        if not isinstance(below, dict):
            below = raw[part] = {}
        raw = below
    raw[key[-1]] = value
