"""A Hugging Face data set as a table; needs the extra `flexlora[hub]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from flexlora.data.tables import Rows, first_line, text_of


@dataclass(frozen=True)
class HubTable:
    """A Hugging Face data set, memory-mapped by `datasets`.

    Attributes:
        source: its id.
        data: the `datasets.Dataset`.
    """

    source: str
    data: Any

    @property
    def names(self) -> tuple[str, ...]:
        """Its columns."""
        return tuple(self.data.column_names)

    def column(self, name: str) -> list[str]:
        """One column whole."""
        return [text_of(value) for value in self.data.select_columns([name])[:][name]]

    def blank(self, name: str) -> Bool[np.ndarray, " rows"]:
        """Computed on the memory-mapped column."""
        return np.array([not text.strip() for text in self.column(name)], dtype=bool)

    def read(self, rows: Rows, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Touches the pages of these rows only."""
        part = self.data.select_columns(list(names))[[int(row) for row in rows]]
        columns = [[text_of(value) for value in part[name]] for name in names]
        return list(zip(*columns, strict=True))


def open_hub(path: str, name: str | None = None, split: str = "train") -> HubTable:
    """Open one split of a data set of the Hugging Face Hub, or of a local folder of data files.

    Raises:
        ImportError: the `datasets` package is not installed.
        ValueError: `datasets` cannot open it; carries its reason.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"data set {path!r}: reading from the Hub needs the `datasets` package: "
            'pip install "flexlora[hub]".'
        ) from None
    try:
        data = datasets.load_dataset(path, name, split=split)
    except Exception as error:  # its own errors, those of the network and of every file format
        raise ValueError(
            f"data set {path!r} (configuration {name!r}, split {split!r}) cannot be opened: "
            f"{first_line(error)} Check the name, the split and the network."
        ) from error
    return HubTable(path, data)
