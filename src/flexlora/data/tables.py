"""Rows of text read on demand: Parquet and JSON Lines.

A table gives whole columns (short ones: names of clients, tasks, splits) and the text of chosen
rows. It holds no text of its own beyond a cache of bounded size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

Rows = Sequence[int] | Int[np.ndarray, " n"]


class Table(Protocol):
    """Rows of named columns."""

    @property
    def source(self) -> str:
        """Where they are, for messages."""

    @property
    def names(self) -> tuple[str, ...]:
        """Columns there are."""

    def column(self, name: str) -> list[str]:
        """One column whole, as text."""

    def blank(self, name: str) -> Bool[np.ndarray, " rows"]:
        """Which rows have nothing but white space there."""

    def read(self, rows: Rows, names: Sequence[str]) -> list[tuple[str, ...]]:
        """The named columns of chosen rows, in the order of `rows`."""


@dataclass(frozen=True)
class ParquetTable:
    """A Parquet file. Reading a row decodes its row group; a few of those are kept.

    Attributes:
        source: the file.
        names: its columns.
        starts: first row of each row group, and the number of rows last.
        group: `(row group, columns) -> decoded rows`, least recently used ones dropped.
    """

    source: str
    names: tuple[str, ...]
    starts: Int[np.ndarray, " groups_and_1"]
    group: Callable[[int, tuple[str, ...]], pa.Table]

    def column(self, name: str) -> list[str]:
        """One column whole; decoded apart from the text."""
        return _strings(self._whole(name))

    def blank(self, name: str) -> Bool[np.ndarray, " rows"]:
        """Computed in Arrow, one row group's text in memory at a time."""
        parts = [_blank(self._part(g, name)) for g in range(len(self.starts) - 1)]
        return np.concatenate([np.empty(0, bool), *parts])

    def read(self, rows: Rows, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Decodes each row group concerned once per call."""
        wanted = np.asarray(rows, dtype=np.int64)
        groups = np.searchsorted(self.starts, wanted, side="right") - 1
        found: list[tuple[str, ...]] = [()] * len(wanted)
        for g in np.unique(groups).tolist():
            here = np.flatnonzero(groups == g)
            part = self.group(g, tuple(names)).take(pa.array(wanted[here] - self.starts[g]))
            columns = [_strings(part[name]) for name in names]
            for position, *values in zip(here.tolist(), *columns, strict=True):
                found[position] = tuple(values)
        return found

    def _part(self, group: int, name: str) -> pa.ChunkedArray:
        with pq.ParquetFile(self.source) as file:
            return file.read_row_group(group, columns=[name])[name]

    def _whole(self, name: str) -> pa.ChunkedArray:
        with pq.ParquetFile(self.source, read_dictionary=[name]) as file:
            return file.read(columns=[name])[name]


def open_parquet(path: str | Path, cache_bytes: int = 256 << 20) -> ParquetTable:
    """Open a Parquet file; reads its footer only.

    Args:
        path: the file.
        cache_bytes: decoded row groups kept, at least one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable Parquet file (an interrupted download has no footer).
    """
    path = existing(path)
    try:
        meta = pq.read_metadata(path)
    except pa.ArrowException as error:
        raise ValueError(
            f"{path}: not a complete Parquet file ({path.stat().st_size} bytes; "
            f"{first_line(error)}). A download may have been interrupted: fetch it again."
        ) from None
    groups = [meta.row_group(g) for g in range(meta.num_row_groups)]
    names = tuple(meta.schema.to_arrow_schema().names)
    largest = max((g.total_byte_size for g in groups), default=1)

    @lru_cache(maxsize=max(1, cache_bytes // max(1, largest)))
    def group(index: int, columns: tuple[str, ...]) -> pa.Table:
        # Instructions repeat for every row of a task: as a dictionary each is kept once.
        try:
            with pq.ParquetFile(path, read_dictionary=list(columns)) as file:
                return file.read_row_group(index, columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{path}: row group {index} cannot be read ({first_line(error)}). "
                "The file is damaged: fetch it again."
            ) from None

    starts = np.cumsum([0, *(g.num_rows for g in groups)])
    return ParquetTable(str(path), names, starts, group)


@dataclass(frozen=True)
class JsonlTable:
    """A file of one JSON object a line. Only the offsets of its lines are held.

    Attributes:
        source: the file.
        names: keys of the first object.
        offsets: first byte of each object, int64.
    """

    source: str
    names: tuple[str, ...]
    offsets: Int[np.ndarray, " rows"]

    def column(self, name: str) -> list[str]:
        """Reads the whole file, keeps one value a row."""
        return [text for (text,) in self._each(range(len(self.offsets)), [name])]

    def blank(self, name: str) -> Bool[np.ndarray, " rows"]:
        """Reads the whole file."""
        rows = range(len(self.offsets))
        return np.array([not text.strip() for (text,) in self._each(rows, [name])], dtype=bool)

    def read(self, rows: Rows, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Seeks to each row."""
        return list(self._each(rows, names))

    def _each(self, rows: Rows, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
        with open(self.source, "rb") as file:
            for row in rows:
                file.seek(int(self.offsets[row]))
                value = parse_object(file.readline(), f"{self.source}, row {row}")
                yield tuple(text_of(value.get(name)) for name in names)


def open_jsonl(path: str | Path) -> JsonlTable:
    """Open a JSON Lines file; reads it once to find its lines. Empty lines are passed over.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file, or a first line that is not a JSON object.
    """
    path = existing(path)
    offsets, position, first = [], 0, b""
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                offsets.append(position)
                first = first or line
            position += len(line)
    if not offsets:
        raise ValueError(f"{path}: empty; expected one JSON object a line.")
    names = tuple(parse_object(first, f"{path}, row 0"))
    return JsonlTable(str(path), names, np.array(offsets, dtype=np.int64))


def existing(path: str | Path, kind: str = "file") -> Path:
    """The path, if it is there.

    Raises:
        FileNotFoundError: it is not; names the nearest folder that exists.
    """
    path = Path(path).expanduser()
    if path.is_dir() if kind == "folder" else path.is_file():
        return path
    near = next((p for p in path.absolute().parents if p.is_dir()), Path("/"))
    what = "is not a " + kind if path.exists() else "not found"
    raise FileNotFoundError(
        f"data: {path} {what}; expected a {kind} (the nearest folder there is: {near}). "
        "Set data.path."
    )


def parse_object(line: bytes | str, where: str) -> dict[str, Any]:
    """One JSON object.

    Raises:
        ValueError: anything else; says where and what to do.
    """
    try:
        value = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(
            f"{where}: not valid JSON ({error}). The file may be cut off: fetch or write it again."
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {type(value).__name__}; expected a JSON object.")
    return value


def text_of(value: object) -> str:
    """A cell as text; missing is empty."""
    return "" if value is None else str(value)


def _strings(values: pa.ChunkedArray) -> list[str]:
    return [text_of(value) for value in values.to_pylist()]


def _blank(values: pa.ChunkedArray) -> Bool[np.ndarray, " rows"]:
    text = values.cast(pa.string())
    return np.asarray(pc.equal(pc.fill_null(pc.utf8_length(pc.utf8_trim_whitespace(text)), 0), 0))


def first_line(error: BaseException) -> str:
    """What an error says, without what follows."""
    return (str(error).splitlines() or [type(error).__name__])[0]
