"""Metrics to TensorBoard, Weights & Biases or trackio: one thin adapter each, imported late."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from flexlora.experiment.errors import Failure, missing

Log = Callable[[Mapping[str, Any], int], None]
"""`log(values, round)`: nested mappings become names with slashes; only numbers are logged."""


def require(names: Sequence[str]) -> None:
    """Refuse, before anything starts, a tracker that is not installed.

    Raises:
        Failure: says what to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise Failure(f"report_to: {name!r} is not installed. {missing(name)}")


@contextmanager
def trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> Iterator[Log]:
    """One function that logs to all of these; they are closed at the end."""
    with ExitStack() as stack:
        logs = [stack.enter_context(_OPEN[name](folder, config)) for name in names]

        def log(values: Mapping[str, Any], round: int) -> None:
            numbers = dict(flatten(values))
            for each in logs:
                each(numbers, round)

        yield log


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers under slashed names.

    >>> dict(flatten({"seen": {"loss": 1.5, "by": {"a": 2}}, "note": "x"}))
    {'seen/loss': 1.5, 'seen/by/a': 2.0}
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)


@contextmanager
def _tensorboard(folder: Path, config: Mapping[str, Any]) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(values: Mapping[str, Any], round: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, round)
        writer.flush()

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def _wandb(folder: Path, config: Mapping[str, Any]) -> Iterator[Log]:
    import wandb

    run = wandb.init(
        project="flexlora", name=folder.name, dir=str(folder), config=dict(config), resume="allow"
    )
    try:
        yield lambda values, round: run.log(dict(values), step=round)
    finally:
        run.finish()


@contextmanager
def _trackio(folder: Path, config: Mapping[str, Any]) -> Iterator[Log]:
    import trackio

    trackio.init(project="flexlora", name=folder.name, config=dict(config), resume="allow")
    try:
        yield lambda values, round: trackio.log(dict(values), step=round)
    finally:
        trackio.finish()


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
