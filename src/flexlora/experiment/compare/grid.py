"""What is compared: methods x rank plans x settings x seeds, each cell an ordinary run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from flexlora.experiment.build import BOUNDS
from flexlora.experiment.config import AboveZero, Config, Metric, Positive, Section
from flexlora.experiment.errors import USAGE, Failure, nearest
from flexlora.experiment.load import Where, place, read_recipe, validate
from flexlora.methods import methods as known_methods

Overrides = dict[str, Any]
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")


class Block(Section):
    """A part of the grid: these by these by these. What is left out stands for all there is."""

    methods: tuple[str, ...] = ()
    """Labels under `methods`."""
    ranks: tuple[str, ...] = ()
    """Labels under `ranks`."""
    settings: tuple[str, ...] = ()
    """Labels under `settings`."""


class Spread(Section):
    """What is expected of paired differences before anything has run, in units of the metric."""

    seeds: AboveZero = 0.02
    """Standard deviation between seeds."""
    clients: AboveZero = 0.1
    """Standard deviation between clients."""


class Comparison(Section):
    """A whole comparison."""

    recipe: str | None = None
    """A run's recipe that every cell starts from."""
    run: dict[str, Any] = Field(default={})
    """Sections of a run's configuration, over the recipe's."""
    methods: dict[str, Overrides] = Field(min_length=1)
    """Label -> settings of the method (`name` if it is not the label), and dotted keys of the run
    (`training.optimizer: sgd`)."""
    ranks: dict[str, Any] = Field(default={"as-configured": None})
    """Label -> rank plan, as under `lora.r`; null: the run's own."""
    settings: dict[str, Overrides] = Field(default={"default": {}})
    """Label -> dotted keys of the run, `lora.alpha_rule: rslora`."""
    grid: tuple[Block, ...] = (Block(),)
    """Which combinations; by default all."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Each runs the whole grid."""
    learning_rates: tuple[AboveZero, ...] = ()
    """The same grid for every arm, each tried under the first seed; the lowest loss on the seen
    clients' `eval` split wins. Empty: the run's own."""
    reference: str | None = None
    """The arm all others are compared with, `method/ranks`; default: the first."""
    metric: Metric = "loss"
    """What conclusions are drawn from."""
    margin: AboveZero = 0.02
    """A difference below this is none: the margin of equivalence, in units of the metric."""
    alpha: AboveZero = 0.05
    """Chance of any false claim in the comparison."""
    spread: Spread = Spread()
    """For the smallest detectable effect, before there are results to estimate it from."""
    export_rank: Positive | None = None
    """Rank at which every arm's model is exported and measured; default: the smallest of the run's
    clients."""
    output_dir: str | None = None
    """New, or of the same comparison, which then goes on. Default: `comparisons/<recipe>`."""

    @field_validator("seeds", "learning_rates")
    @classmethod
    def _once(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        again = sorted({v for v in values if values.count(v) > 1})
        if again:
            raise ValueError(f"{again} repeats; a repeated cell is not a new observation")
        return values

    @model_validator(mode="after")
    def _labels(self) -> Comparison:
        for kind in ("methods", "ranks", "settings"):
            for label in (known := getattr(self, kind)):
                if not LABEL.fullmatch(label):
                    raise ValueError(f"{kind}: label {label!r}; expected letters, digits, . and -")
            for label in (label for block in self.grid for label in getattr(block, kind)):
                if label not in known:
                    raise ValueError(f"grid: unknown {kind} {label!r}; {nearest(label, known)}")
        arms = list(dict.fromkeys(_arms(self)))
        if self.reference is not None and self.reference not in map(str, arms):
            hint = nearest(self.reference, map(str, arms))
            raise ValueError(f"reference {self.reference!r} is no arm; {hint}")
        return self


@dataclass(frozen=True, order=True)
class Arm:
    """One way of doing it: what is compared with what."""

    method: str
    ranks: str
    setting: str = "default"

    def __str__(self) -> str:
        parts = (self.method, self.ranks, self.setting)
        return "/".join(parts[: 2 + (self.setting != "default")])


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: an arm at a learning rate under a seed."""

    arm: Arm
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Of its directory."""
        rate = self.config.training.learning_rate
        return f"{str(self.arm).replace('/', '_')}_lr{rate:g}_seed{self.seed}"


def load_comparison(source: str | Path, words: Sequence[str] = ()) -> Comparison:
    """A comparison from a YAML file, with overrides such as `--run.training.max_steps 2`.

    Raises:
        Failure: as for a run's configuration, and an unknown method, by name with the nearest.
    """
    raw, where, path = read_recipe(source, words)
    found = validate(raw, where, path, Comparison)
    inner: Where = {k[1:]: v for k, v in where.items() if k[0] == "run"}
    for label, about in found.methods.items():
        name = str(about.get("name", label))
        if name not in (*known_methods, *BOUNDS) and ":" not in name:
            hint = nearest(name, [*known_methods, *BOUNDS])
            raise Failure(f"{path}: methods.{label}: unknown method {name!r}; {hint}", USAGE)
    for arm in arms(found):
        configure(found, arm, found.seeds[0], None, inner, path)
    return found


def arms(comparison: Comparison) -> list[Arm]:
    """Every arm once, the reference first."""
    found = list(dict.fromkeys(_arms(comparison)))
    if comparison.reference:
        found.sort(key=lambda arm: str(arm) != comparison.reference)
    return found


def _arms(c: Comparison) -> list[Arm]:
    return [
        Arm(*labels)
        for block in c.grid
        for labels in product(
            block.methods or c.methods, block.ranks or c.ranks, block.settings or c.settings
        )
    ]


def configure(
    comparison: Comparison,
    arm: Arm,
    seed: int,
    rate: float | None,
    where: Where | None = None,
    source: str = "comparison",
) -> Cell:
    """The run that an arm stands for under one seed, at one learning rate (None: its own).

    Raises:
        Failure: a key or a value that a run does not take.
    """
    raw: dict[str, Any] = read_recipe(comparison.recipe)[0] if comparison.recipe else {}
    _merge(raw, deepcopy(comparison.run))
    about = comparison.methods[arm.method]
    dotted = {k: v for k, v in about.items() if "." in k} | comparison.settings[arm.setting]
    raw["method"] = {"name": arm.method, **{k: v for k, v in about.items() if "." not in k}}
    for key, value in dotted.items():
        place(raw, tuple(key.split(".")), deepcopy(value))
    if comparison.ranks[arm.ranks] is not None:
        place(raw, ("lora", "r"), deepcopy(comparison.ranks[arm.ranks]))
    place(raw, ("federation", "seed"), seed)
    if rate is not None:
        place(raw, ("training", "learning_rate"), rate)
    raw["output_dir"] = None
    return Cell(arm, seed, validate(raw, where, f"{source}: {arm}"))


def placed(cell: Cell, folder: Path) -> Cell:
    """The same cell with its directory under the comparison's."""
    config = cell.config.model_copy(update={"output_dir": str(folder / "cells" / cell.name)})
    return replace(cell, config=config)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Sections are merged key by key; anything deeper is replaced."""
    for section, values in above.items():
        if isinstance(values, Mapping) and isinstance(below.get(section), dict):
            below[section] = {**below[section], **values}
        else:
            below[section] = values
