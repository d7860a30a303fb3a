"""`flexlora compare`: check the grid, choose learning rates, run what is missing, conclude."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flexlora.experiment import runs
from flexlora.experiment.compare.cells import ABOUT, insist, open_first, run_cell
from flexlora.experiment.compare.grid import Arm, Cell, Comparison, arms, configure, placed
from flexlora.experiment.compare.results import Result, chosen, read_cell, tuned
from flexlora.experiment.compare.statistics import smallest_detectable, too_few
from flexlora.experiment.compare.tables import as_csv, as_markdown, summarise
from flexlora.experiment.console import Console
from flexlora.experiment.errors import RUN, USAGE, Failure, blame
from flexlora.experiment.evaluation import sample
from flexlora.experiment.workshop import Workshop

RESULT = "comparison.json"
"""What a comparison ends with; the report is made from it and from the cells."""


def compare(comparison: Comparison, folder: Path, console: Console) -> dict[str, Any]:
    """Run every cell that is not there yet and write the tables; returns `comparison.json`.

    Stopped at any moment, it goes on where it was; a grid that has grown runs only what is new.

    Args:
        comparison: checked.
        folder: new, or of the same comparison.
        console: where people read.

    Raises:
        Failure: nothing in the grid can run or came to its end, or the directory was made with
            other settings.
    """
    firsts = {
        str(arm): configure(comparison, arm, comparison.seeds[0], None) for arm in arms(comparison)
    }
    shop, refused = open_first(firsts, console)
    for name, why in refused.items():
        console.say(f"{name} is refused: {why}")
    if shop is None:
        raise Failure("no cell of the grid can run; see the reasons above.", USAGE)
    claim(folder, comparison)
    admitted = [cell.arm for name, cell in firsts.items() if name not in refused]
    console.say(outlook(comparison, shop, len(admitted)))
    rates, stopped = tune(comparison, admitted, folder, console, shop)
    refused |= stopped
    found: dict[str, Any] = {}
    for seed in comparison.seeds:
        for arm in [arm for arm in rates if str(arm) not in refused]:  # whole or not at all
            cell = one(comparison, arm, seed, rates[arm], folder)
            if why := attempt(cell, comparison.export_rank, console, shop):
                refused[str(arm)] = why
        found = write_tables(comparison, folder, refused, rates)
    console.rest()
    if not found["arms"]:
        raise Failure("no cell came to its end; see the reasons above.", RUN)
    console.say((folder / "comparison.md").read_text(encoding="utf-8"))
    return found


def claim(folder: Path, comparison: Comparison) -> None:
    """Make the directory, or accept one of a comparison; its cells are checked one by one.

    Raises:
        Failure: a directory with something else in it.
    """
    path = folder / "comparison.yaml"
    if folder.exists() and not path.is_file() and any(folder.iterdir()):
        raise Failure(f"{folder} is not a comparison: it has no comparison.yaml.", RUN)
    with blame(RUN, f"output_dir {folder}"):
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(
        runs.plain(comparison.model_dump(exclude={"output_dir"})),
        sort_keys=False,
        allow_unicode=True,
    )
    runs.write(path, text)


def one(comparison: Comparison, arm: Arm, seed: int, rate: float | None, folder: Path) -> Cell:
    """A cell with its directory."""
    return placed(configure(comparison, arm, seed, rate), folder)


def outlook(comparison: Comparison, shop: Workshop, count: int) -> str:
    """What this comparison will be able to tell, before anything of it has run."""
    e, limit = shop.experiment, shop.experiment.config.evaluation.max_clients
    group = e.unseen or e.seen
    clients, seeds = len(sample(shop, group, "test", limit)), len(comparison.seeds)
    cells = count * (seeds + max(len(comparison.learning_rates) - 1, 0))
    head = f"{count} arms, {seeds} seeds, {cells} runs; the same command goes on if it is stopped"
    if why := too_few(seeds, clients):
        return f"{head}\n{why}: this grid will describe and conclude nothing."
    given = comparison.spread
    least = smallest_detectable(
        seeds, clients, (given.seeds, given.clients), max(count - 1, 1), comparison.alpha
    )
    return (
        f"{head}\nsmallest difference in {comparison.metric} that it finds 4 times in 5, if paired "
        f"differences vary by {given.seeds:g} between seeds and {given.clients:g} between clients "
        f"(spread): {least:.3g}"
    )


def attempt(cell: Cell, export_rank: int | None, console: Console, shop: Workshop) -> str:
    """Run a cell; why it stopped, or nothing. The others go on: the same command tries it again.

    Raises:
        Failure: its directory was made with other settings.
    """
    insist(Path(str(cell.config.output_dir)), cell.config)
    try:
        run_cell(cell, export_rank, console, shop)
    except Failure as failure:
        console.say(f"{cell.name} stopped: {failure}")
        return f"stopped under seed {cell.seed}: {failure}"
    return ""


def tune(
    comparison: Comparison, admitted: Sequence[Arm], folder: Path, console: Console, shop: Workshop
) -> tuple[dict[Arm, float], dict[str, str]]:
    """Run every learning rate of the grid under the first seed; the rate of each arm.

    Also why cells stopped, and the arms that no rate carried to the end.

    Raises:
        Failure: rates to choose from and no evaluation on the way to choose by.
    """
    seed, results, stopped = comparison.seeds[0], list[Result](), dict[str, str]()
    firsts = {arm: configure(comparison, arm, seed, None) for arm in admitted}
    if len(comparison.learning_rates) > 1 and not shop.experiment.config.evaluation.every:
        raise Failure("learning_rates: choosing one takes run.evaluation.every above 0.", USAGE)
    for arm in admitted:
        alone = firsts[arm].config.method.name == "local-only"  # nothing on the way to choose by
        for rate in [None] if alone else comparison.learning_rates or [None]:
            cell = one(comparison, arm, seed, rate, folder)
            if why := attempt(cell, comparison.export_rank, console, shop):
                stopped[f"{arm} at {cell.config.training.learning_rate:g}"] = why
            else:
                results.append(read_cell(Path(str(cell.config.output_dir))))
    rates = tuned(results, seed)
    lost = [str(arm) for arm in admitted if arm not in rates]
    return rates, stopped | dict.fromkeys(lost, "it reached no loss at any learning rate")


def finished(comparison: Comparison, folder: Path, rates: Mapping[Arm, float]) -> list[Result]:
    """The grid's cells that are complete, in its order."""
    cells = [one(comparison, a, s, r, folder) for a, r in rates.items() for s in comparison.seeds]
    paths = [Path(str(cell.config.output_dir)) for cell in cells]
    return [read_cell(path) for path in paths if (path / ABOUT).is_file()]


def write_tables(
    comparison: Comparison, folder: Path, refused: Mapping[str, str], rates: Mapping[Arm, float]
) -> dict[str, Any]:
    """`comparison.json`, `.csv` and `.md` from the cells that are complete."""
    rates = {arm: rate for arm, rate in rates.items() if str(arm) not in refused}
    done = chosen(finished(comparison, folder, rates), rates)
    found = summarise(comparison, done, refused)
    runs.write(folder / RESULT, json.dumps(found, indent=2))
    runs.write(folder / "comparison.csv", as_csv(done))
    runs.write(folder / "comparison.md", as_markdown(found))
    return found
