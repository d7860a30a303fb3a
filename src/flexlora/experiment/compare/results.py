"""What the cells of a comparison hold, read from their directories alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from flexlora.experiment.compare.cells import ABOUT
from flexlora.experiment.compare.grid import Arm
from flexlora.experiment.runs import read, read_metrics

BETTER_LOW = {"loss"}
"""Metrics of which less is better."""


@dataclass(frozen=True)
class Point:
    """One evaluation on the way: after `round` rounds and `bytes_up` uploaded by all clients."""

    round: int
    bytes_up: int
    values: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Over clients, each counting once."""
        return fmean(self.values.values())


@dataclass(frozen=True)
class Result:
    """A finished cell.

    Attributes:
        folder: its run directory.
        about: `cell.json`.
        metrics: `metrics.jsonl`.
    """

    folder: Path
    about: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    @property
    def arm(self) -> Arm:
        """What is compared."""
        return Arm(*self.about["arm"])

    @property
    def seed(self) -> int:
        """Under which it ran."""
        return int(self.about["seed"])

    @property
    def rate(self) -> float:
        """The learning rate."""
        return float(self.about["learning_rate"])

    @property
    def peak_bytes(self) -> int:
        """Of the client that needs most, without activations."""
        return max(int(level["bytes"]) for level in self.about["levels"].values())


def read_cell(folder: Path) -> Result:
    """A finished cell."""
    return Result(folder, read(folder / ABOUT), read_metrics(folder))


def read_cells(folder: Path) -> list[Result]:
    """Every finished cell of a comparison, by name."""
    return [read_cell(p.parent) for p in sorted((folder / "cells").glob(f"*/{ABOUT}"))]


def evaluations(metrics: Iterable[Mapping[str, Any]], **wanted: str) -> list[Mapping[str, Any]]:
    """The evaluation lines with these values, in order: `split="test", view="global"`."""
    return [
        m
        for m in metrics
        if m["kind"] == "evaluation" and all(m.get(k) == v for k, v in wanted.items())
    ]


def final(result: Result, view: str, group: str, metric: str) -> dict[str, float]:
    """Client -> score after the last round, seen one of three ways; empty if not measured.

    Args:
        result: a cell.
        view: `global` (the full server state), `own` (each client's rank) or `exported`.
        group: `seen` or `unseen`.
        metric: by name.
    """
    if view == "exported":
        lines = [result.about["exported"]] if result.about["exported"] else []
    else:
        lines = evaluations(result.metrics, split="test", view=view)
        lines = [m for m in lines if m["round"] > 0]
    return scores(lines[-1], group, metric) if lines else {}


def scores(line: Mapping[str, Any], group: str, metric: str) -> dict[str, float]:
    """Client -> score in one evaluation."""
    each = line.get(group, {}).get("each", {})
    return {c: row[metric] for c, row in each.items() if metric in row}


def curve(
    metrics: Sequence[Mapping[str, Any]], group: str, metric: str, split: str = "eval"
) -> list[Point]:
    """A metric of the global model along the rounds and the bytes uploaded by then."""
    points, up = list[Point](), 0
    for line in metrics:
        if line["kind"] == "round":
            up += line["bytes_up"]
            continue
        if (line.get("split"), line.get("view")) != (split, "global"):
            continue
        if values := scores(line, group, metric):
            points.append(Point(line["round"], up, values))
    return points


def categories(results: Iterable[Result]) -> dict[str, str]:
    """Client -> category, over all cells."""
    found: dict[str, str] = {}
    for result in results:
        for line in evaluations(result.metrics):
            for group in ("seen", "unseen"):
                found |= line.get(group, {}).get("categories", {})
    return found


def tuned(results: Sequence[Result], first_seed: int) -> dict[Arm, float]:
    """The learning rate of each arm: lowest loss of seen clients' `eval` split, first seed."""
    best: dict[Arm, tuple[float, float]] = {}
    for result in (r for r in results if r.seed == first_seed):
        points = curve(result.metrics, "seen", "loss")
        loss = points[-1].mean if points else float("inf")
        if loss == loss:  # not for a diverged run
            best[result.arm] = min(
                best.get(result.arm, (float("inf"), result.rate)), (loss, result.rate)
            )
    return {arm: rate for arm, (_, rate) in best.items()}


def chosen(results: Sequence[Result], rates: Mapping[Arm, float]) -> dict[Arm, dict[int, Result]]:
    """Arm -> seed -> the cell at the arm's learning rate."""
    found: dict[Arm, dict[int, Result]] = {}
    for r in results:
        if rates.get(r.arm) == r.rate:
            found.setdefault(r.arm, {})[r.seed] = r
    return found


def at_bytes(result: Result, budget: float, group: str, metric: str) -> dict[str, float]:
    """The last evaluation on the way that lies within a budget of uploaded bytes."""
    within = [p for p in curve(result.metrics, group, metric) if p.bytes_up <= budget]
    return dict(within[-1].values) if within else {}
