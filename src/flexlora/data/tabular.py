"""A table into a population: which rows are whose, and which split each is in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Int

from flexlora.adapter import stable_seed
from flexlora.data.partition import by_column, dirichlet, iid, skewed
from flexlora.data.settings import call, few, nearest
from flexlora.data.tables import Table
from flexlora.data.task import Example, Split, Task

Rows = Int[np.ndarray, " rows"]
EmptyAnswers = Literal["error", "drop"]
SPLITS: tuple[Split, ...] = get_args(Split)
SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "eval": "eval",
    "validation": "eval",
    "valid": "eval",
    "dev": "eval",
    "test": "test",
}


@dataclass(frozen=True)
class Columns:
    """Which column holds what.

    Without `client`, every task is a client. Without `split`, each client's rows are shared out.
    All but `instruction` and `output` may be absent under their default names.
    """

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    client: str = "client"
    task: str = "task"
    category: str = "category"
    split: str = "split"


@dataclass(frozen=True)
class Sharing:
    """How a client's rows become train, eval and test where the data does not say.

    Attributes:
        eval: fraction of the rows, rounded.
        test: fraction of the rows, rounded.
        seed: of the shuffle; each client has its own.
    """

    eval: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.eval, self.test) < 0 or self.eval + self.test >= 1:
            raise ValueError(
                f"sharing: eval {self.eval}, test {self.test}; expected fractions of at least 0 "
                "whose sum is below 1, so that something is left to train on."
            )


def table_population(
    table: Table,
    columns: Columns | None = None,
    partition: Mapping[str, object] | None = None,
    sharing: Sharing | None = None,
    empty_answers: EmptyAnswers = "error",
) -> dict[str, Task]:
    """The clients of a table. Reads its short columns now, and text when a task is loaded.

    Args:
        table: the rows.
        columns: which column holds what.
        partition: `by` (`column`, `dirichlet`, `iid` or `skewed`) and the settings of that function
            of :mod:`flexlora.data.partition`; None takes the clients that the table names.
        sharing: of each client's rows, where the table has no split column.
        empty_answers: refuse them, or leave their rows out.

    Raises:
        ValueError: a column that is not there, a split of unknown name, an empty answer (unless
            dropped), a client without training rows.
    """
    columns = columns or Columns()
    check_columns(table, columns)
    keep = answered(table, columns.output, empty_answers)
    owners = client_rows(table, columns, partition, len(keep))
    splits = split_rows(table, columns, sharing or Sharing())
    tasks, categories = (labels(table, name) for name in (columns.task, columns.category))
    population = {}
    for client, rows in owners.items():
        parts = splits(client, rows[keep[rows]])
        task, category = tasks(rows, client), categories(rows, "uncategorized")
        sizes = {split: len(part) for split, part in parts.items()}
        load = partial(read_split, table, columns, parts)
        population[client] = Task(client, task, category, sizes, load)
    return require_training(population, table.source)


def read_split(
    table: Table, columns: Columns, parts: Mapping[Split, Rows], split: Split
) -> list[Example]:
    """One client's examples of one split, read now."""
    names = [columns.instruction, columns.output]
    if columns.input in table.names:
        names.append(columns.input)
    rows = table.read(parts[split], names)
    return [Example(instruction, "".join(rest), output) for instruction, output, *rest in rows]


def check_columns(table: Table, columns: Columns) -> None:
    """Refuse a column that is not there.

    Raises:
        ValueError: names the column, the nearest one, and those there are.
    """
    for role, name in asdict(columns).items():
        optional = role not in ("instruction", "output") and name == getattr(Columns(), role)
        if name not in table.names and not optional:
            raise ValueError(
                f"{table.source}: no column {name!r} for the {role}{nearest(name, table.names)}. "
                f"Its columns: {', '.join(table.names)}. Set data.columns.{role}."
            )


def answered(table: Table, output: str, empty_answers: EmptyAnswers) -> Bool[np.ndarray, " rows"]:
    """Which rows have an answer.

    Raises:
        ValueError: some have none and `empty_answers` is not `drop`.
    """
    blank = table.blank(output)
    if blank.any() and empty_answers != "drop":
        raise ValueError(
            f"{table.source}: {blank.sum()} of {len(blank)} rows have an empty {output!r} "
            f"(rows {few(np.flatnonzero(blank))}); there is nothing to learn from them. "
            "Set data.empty_answers: drop to leave them out."
        )
    return ~blank


def client_rows(
    table: Table, columns: Columns, partition: Mapping[str, object] | None, rows: int
) -> dict[str, Rows]:
    """Client -> its rows: as the table names them, or as a partition deals them.

    Raises:
        ValueError: neither a client nor a task column and no partition; or a wrong partition.
    """
    if partition is None:
        for name in (columns.client, columns.task):
            if name in table.names:
                return by_column(table.column(name))
        raise ValueError(
            f"{table.source}: no column {columns.client!r} or {columns.task!r} that says whose a "
            f"row is. Its columns: {', '.join(table.names)}. Set data.columns.client or "
            "data.partition."
        )
    settings = dict(partition)
    by = settings.pop("by", None)
    if by in ("column", "dirichlet"):
        column = str(settings.pop("column", columns.category))
        if column not in table.names:
            raise ValueError(
                f"{table.source}: partition.column: no column {column!r}"
                f"{nearest(column, table.names)}. Its columns: {', '.join(table.names)}."
            )
        scheme = by_column if by == "column" else dirichlet
        return call(scheme, settings, "data.partition", table.column(column))
    if by in ("iid", "skewed"):
        return call(iid if by == "iid" else skewed, settings, "data.partition", rows)
    raise ValueError(f"partition.by: {by!r}; expected 'column', 'dirichlet', 'iid' or 'skewed'.")


def split_rows(
    table: Table, columns: Columns, sharing: Sharing
) -> Callable[[str, Rows], dict[Split, Rows]]:
    """A function from a client and its rows to its splits.

    Raises:
        ValueError: a value of the split column that is none.
    """
    if columns.split not in table.names:
        return lambda client, rows: share(rows, client, sharing)
    values = table.column(columns.split)
    unknown = sorted(set(values) - set(SPLIT_NAMES))
    if unknown:
        raise ValueError(
            f"{table.source}: column {columns.split!r} has {few(map(repr, unknown))}; expected "
            f"{', '.join(SPLIT_NAMES)}."
        )
    code = np.array([SPLITS.index(SPLIT_NAMES[value]) for value in values], dtype=np.int8)
    return lambda client, rows: {s: rows[code[rows] == i] for i, s in enumerate(SPLITS)}


def share(rows: Rows, client: str, sharing: Sharing) -> dict[Split, Rows]:
    """A client's rows shared out at random; at least one is left to train on.

    >>> parts = share(np.arange(20), "a", Sharing())
    >>> {split: len(part) for split, part in parts.items()}
    {'train': 16, 'eval': 2, 'test': 2}
    """
    generator = np.random.default_rng(stable_seed(sharing.seed, "sharing", client))
    order = generator.permutation(rows)
    test = min(round(len(rows) * sharing.test), max(len(rows) - 1, 0))
    held = min(round(len(rows) * sharing.eval), max(len(rows) - 1 - test, 0))
    pieces = order[test + held :], order[test : test + held], order[:test]
    return {split: np.sort(piece) for split, piece in zip(SPLITS, pieces, strict=True)}


def labels(table: Table, name: str) -> Callable[[Rows, str], str]:
    """A function from rows to the one value they share in a column: `mixed` if several.

    Where the column is absent it returns its second argument.
    """
    if name not in table.names:
        return lambda rows, otherwise: otherwise
    values = table.column(name)

    def label(rows: Rows, otherwise: str) -> str:
        found = {values[row] for row in rows}
        return found.pop() if len(found) == 1 else "mixed"

    return label


def require_training(population: dict[str, Task], source: str) -> dict[str, Task]:
    """The population itself.

    Raises:
        ValueError: it is empty, or a client has nothing to train on.
    """
    if not population:
        raise ValueError(f"{source}: no clients; expected at least one. Is it the right place?")
    without = [client for client, task in population.items() if not task.sizes["train"]]
    if without:
        raise ValueError(
            f"{source}: {len(without)} of {len(population)} clients have no training example: "
            f"{few(without)}. Expected at least one each. Remove them or change how it is split."
        )
    return population
