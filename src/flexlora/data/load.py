"""One entry to every kind of data: `load_population(kind, **settings)`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flexlora.data.folders import release_population, repository_population
from flexlora.data.hub import open_hub
from flexlora.data.reasoning import reasoning_gym_population
from flexlora.data.settings import SettingError, call, nearest
from flexlora.data.tables import open_jsonl, open_parquet
from flexlora.data.tabular import (
    Columns,
    EmptyAnswers,
    Sharing,
    require_training,
    table_population,
)
from flexlora.data.task import Task

Settings = Mapping[str, object]


def load_population(kind: str, **settings: object) -> dict[str, Task]:
    """The clients of a data source; their text is read when a task is loaded.

    Args:
        kind: a name in :data:`LOADERS`, or `package.module:function`: a function of one's own that
            takes the settings and returns a mapping from client id to :class:`Task`.
        settings: of that loader.

    Raises:
        SettingError: an unknown kind or setting, with the nearest name.
        ValueError: what the loader refuses.
        FileNotFoundError: a path that is not there.
        ImportError: a package or a plugin that is not there.
    """
    if ":" in kind:
        return _checked(call(plugin(kind), settings, "data"), kind)
    if kind not in LOADERS:
        raise SettingError(
            f"data.kind: {kind!r} is unknown{nearest(kind, LOADERS)}. Expected one of "
            f"{', '.join(LOADERS)}, or 'package.module:function'."
        )
    return call(LOADERS[kind], settings, "data")


def parquet(
    path: str | Path,
    columns: Settings | None = None,
    partition: Settings | None = None,
    sharing: Settings | None = None,
    empty_answers: EmptyAnswers = "error",
    cache_bytes: int = 256 << 20,
) -> dict[str, Task]:
    """A Parquet file; see :func:`~flexlora.data.tabular.table_population`.

    Args:
        path: the file.
        columns: settings of :class:`~flexlora.data.tabular.Columns`.
        partition: `by` and its settings; None takes the clients that the file names.
        sharing: settings of :class:`~flexlora.data.tabular.Sharing`.
        empty_answers: `error`, or `drop` to leave such rows out.
        cache_bytes: decoded row groups kept in memory.
    """
    table = open_parquet(path, cache_bytes)
    return table_population(table, *_table(columns, partition, sharing, empty_answers))


def jsonl(
    path: str | Path,
    columns: Settings | None = None,
    partition: Settings | None = None,
    sharing: Settings | None = None,
    empty_answers: EmptyAnswers = "error",
) -> dict[str, Task]:
    """A JSON Lines file; settings as of :func:`parquet`."""
    return table_population(open_jsonl(path), *_table(columns, partition, sharing, empty_answers))


def hub(
    path: str,
    name: str | None = None,
    split: str = "train",
    columns: Settings | None = None,
    partition: Settings | None = None,
    sharing: Settings | None = None,
    empty_answers: EmptyAnswers = "error",
) -> dict[str, Task]:
    """A data set of the Hugging Face Hub; needs the extra `flexlora[hub]`.

    Args:
        path: its id, or a local folder of data files.
        name: its configuration, where it has several.
        split: the one that is dealt out to clients.
        columns: and the further settings as of :func:`parquet`.
        partition: as there.
        sharing: as there.
        empty_answers: as there.
    """
    table = open_hub(path, name, split)
    return table_population(table, *_table(columns, partition, sharing, empty_answers))


LOADERS: dict[str, Callable[..., dict[str, Task]]] = {
    "reasoning-gym": reasoning_gym_population,
    "parquet": parquet,
    "release": release_population,
    "natural-instructions": repository_population,
    "jsonl": jsonl,
    "hub": hub,
}
"""Kind -> its loader, whose keyword arguments are the settings."""


def plugin(path: str) -> Callable[..., Any]:
    """What `package.module:name` names.

    >>> plugin("math:sqrt")(4.0)
    2.0

    Raises:
        ImportError: no such module, no such name in it, or it cannot be called.
    """
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{path!r}: module {module!r} cannot be imported ({error}). Expected "
            "'package.module:function', on Python's path (PYTHONPATH)."
        ) from error
    if not callable(getattr(found, name, None)):
        public = [n for n, v in vars(found).items() if callable(v) and not n.startswith("_")]
        raise ImportError(f"{path!r}: {module!r} has no function {name!r}{nearest(name, public)}.")
    return getattr(found, name)  # type: ignore[no-any-return]


def _table(
    columns: Settings | None,
    partition: Settings | None,
    sharing: Settings | None,
    empty_answers: EmptyAnswers,
) -> tuple[Columns, Settings | None, Sharing, EmptyAnswers]:
    return (
        call(Columns, columns or {}, "data.columns"),
        partition,
        call(Sharing, sharing or {}, "data.sharing"),
        empty_answers,
    )


def _checked(found: object, kind: str) -> dict[str, Task]:
    """A plugin's return value, if it is a population."""
    if not isinstance(found, Mapping) or not found:
        raise ValueError(
            f"{kind}: returned {type(found).__name__}; expected a mapping from client id to Task "
            "with at least one client."
        )
    for client, task in found.items():
        if not isinstance(task, Task) or task.id != client:
            raise ValueError(
                f"{kind}: client {client!r} is {type(task).__name__}; expected a flexlora Task "
                "whose id is that key."
            )
    return require_training(dict(found), kind)
