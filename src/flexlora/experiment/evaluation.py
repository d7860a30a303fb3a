"""Whom a run measures, on what, and the tables that come of it. The base model is always first."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexlora.adapter import Adapter, load_peft, stable_seed
from flexlora.data.task import Population, Split
from flexlora.experiment.console import Console
from flexlora.experiment.errors import MODEL, blame
from flexlora.experiment.export import final_state
from flexlora.experiment.initial import insist_on_base
from flexlora.experiment.runs import append_metrics, identify, open_run
from flexlora.experiment.summary import evaluation_line
from flexlora.experiment.trackers import Log
from flexlora.experiment.workshop import Workshop, open_workshop
from flexlora.federation.state import ServerState, Term, ranks_of
from flexlora.training.evaluate import Metric, Scores, summary
from flexlora.training.kept import recall

CLIENTS_AT_ONCE = 32


def sample(shop: Workshop, clients: Sequence[str], split: Split, limit: int | None) -> list[str]:
    """Those that have the split, at most `limit`: a draw from the run's seed, always the same."""
    e = shop.experiment
    having = [c for c in clients if e.population[c].sizes.get(split, 0)]
    if limit is None or limit >= len(having):
        return having
    draw = random.Random(stable_seed(e.config.federation.seed, "evaluated"))
    return sorted(draw.sample(having, limit))


@dataclass(frozen=True, eq=False)
class View:
    """A model to be measured: the base, plus a patch, plus an adapter for everybody."""

    adapter: Adapter = field(default_factory=dict)
    patch: Mapping[str, Term] = field(default_factory=dict)
    round: int = 0


BASE = View()
"""The base model itself: the zero line of every table."""


def global_view(shop: Workshop, state: ServerState) -> View:
    """The whole global model of a state."""
    return View(shop.experiment.method.view(state, None), state.patch, state.round)


def ask(
    shop: Workshop,
    views: Mapping[str, Adapter],
    patch: Mapping[str, Term],
    split: Split,
    metrics: Collection[Metric],
) -> dict[str, Scores]:
    """Every client's scores under its own view, within the limits of the configuration."""
    limits = shop.experiment.config.evaluation
    return shop.engine.evaluate(
        views,
        patch,
        split,
        metrics,
        limits.max_examples,
        limits.max_generated,
        limits.max_new_tokens,
    )


def table(population: Population, found: Mapping[str, Scores]) -> dict[str, Any]:
    """Means of a group of clients: each counting once, weighted by examples, and by category."""
    categories: dict[str, dict[str, Scores]] = {}
    for client, score in found.items():
        categories.setdefault(population[client].category, {})[client] = score
    return {
        "clients": len(found),
        "examples": sum(s.examples for s in found.values()),
        "mean": summary(found),
        "weighted": summary(found, weighted=True),
        "by_category": {name: summary(group) for name, group in sorted(categories.items())},
        "each": {c: dict(s.values) for c, s in found.items()},
        "categories": {c: population[c].category for c in found},
    }


def measure(
    shop: Workshop, view: View, split: Split, metrics: Collection[Metric], limit: int | None
) -> dict[str, Any]:
    """One evaluation of one model on everybody: a line of `metrics.jsonl`.

    Args:
        shop: the experiment.
        view: the model.
        split: which examples.
        metrics: what to measure.
        limit: clients of each group.
    """
    e = shop.experiment
    line: dict[str, Any] = {"round": view.round, "split": split, "view": "global"}
    for name, group in (("seen", e.seen), ("unseen", e.unseen)):
        clients, found = sample(shop, group, split, limit), dict[str, Scores]()
        for some in _portions(clients):
            shop.console.progress(f"evaluating {name} clients: {len(found)} of {len(clients)}")
            found |= ask(shop, dict.fromkeys(some, view.adapter), view.patch, split, metrics)
        line[name] = table(e.population, found)
    return line


def measure_own(shop: Workshop, state: ServerState, limit: int | None) -> dict[str, Any]:
    """Answer loss of seen clients, each under what it would be handed at its own rank."""
    e, found, ranks = shop.experiment, dict[str, Scores](), dict[str, list[int]]()
    registered = [c for c in e.seen if c in e.clients]
    for some in _portions(sample(shop, registered, "test", limit)):
        shop.console.progress(f"evaluating clients at their own ranks: {len(found)} done")
        views = {c: own_view(shop, state, c) for c in some}
        ranks |= {c: sorted(set(ranks_of(view).values())) for c, view in views.items()}
        found |= ask(shop, views, state.patch, "test", {"loss"})
    seen = table(e.population, found)
    return {"round": state.round, "split": "test", "view": "own", "seen": seen, "ranks": ranks}


def own_view(shop: Workshop, state: ServerState, client: str) -> Adapter:
    """What a client works with at its own rank, with what it keeps between rounds."""
    e = shop.experiment
    if e.method.stateless:
        return e.method.view(state, e.clients[client])
    payload = e.method.downlink(state, e.clients[client])
    return recall(shop.engine.kept, payload).adapter


def _portions(clients: Sequence[str]) -> Iterator[Sequence[str]]:
    """A few clients at a time: bounds the memory of their text and of their own views."""
    for start in range(0, len(clients), CLIENTS_AT_ONCE):
        yield clients[start : start + CLIENTS_AT_ONCE]


def note(shop: Workshop, line: Mapping[str, Any], log: Log | None = None) -> None:
    """An evaluation to `metrics.jsonl`, to the trackers and to people."""
    append_metrics(shop.folder, "evaluation", line)
    if log:
        log({line["split"]: {line["view"]: line}}, line["round"])
    shop.console.say(evaluation_line(line))


def sample_answers(shop: Workshop, view: View, count: int) -> list[dict[str, str]]:
    """The first test question of a few unseen clients (seen ones if all are), answered in full."""
    e = shop.experiment
    clients = sample(shop, e.unseen, "test", count) or sample(shop, e.seen, "test", count)
    if not clients or not count:
        return []
    found = shop.engine.evaluate(
        dict.fromkeys(clients, view.adapter),
        view.patch,
        "test",
        {"exact_match"},
        max_examples=1,
        max_generated=1,
        max_new_tokens=e.config.evaluation.max_new_tokens,
    )
    return [
        {
            "client": client,
            "question": "\n\n".join(filter(None, (a.example.instruction, a.example.input))),
            "reference": a.example.output,
            "answer": a.generated,
        }
        for client, score in found.items()
        for a in score.answers
    ]


def view_of_folder(shop: Workshop, folder: Path) -> View:
    """An adapter from a PEFT folder, to be measured on this run's clients.

    Raises:
        Failure: unreadable, or made for another base model.
    """
    with blame(MODEL, "adapter"):
        adapter, shapes = load_peft(folder), shop.base.shapes
        odd = [m for m, d in adapter.items() if shapes.get(m) != d.shape]
        if odd:
            raise ValueError(
                f"{folder}: {len(odd)} modules do not fit base model {shop.base.name}, "
                f"{odd[:2]}. Use the model it was made with."
            )
        insist_on_base(folder, shop.base.fingerprint)
    return View(adapter)


def evaluate_run(
    folder: Path, adapter: Path | None, split: Split, console: Console
) -> dict[str, Any]:
    """Measure a run's model, or any PEFT adapter of the same base, on the run's clients.

    Nothing is written.

    Raises:
        Failure: not a run, no checkpoint yet, another base model.
    """
    config = open_run(folder)
    state = final_state(folder, config)
    shop = open_workshop(config, folder, console)
    identify(folder, shop.base.name, shop.base.fingerprint)
    view = global_view(shop, state) if adapter is None else view_of_folder(shop, adapter)
    wanted = config.evaluation
    line = measure(shop, view, split, wanted.metrics, wanted.max_clients)
    console.rest()
    return line


def describe(line: Mapping[str, Any]) -> str:
    """One evaluation as a table: groups, then categories."""
    names = sorted({m for g in ("seen", "unseen") for m in line[g]["mean"]})
    rows = [f"{'':34}{'clients':>8}" + "".join(f"{name:>24}" for name in names)]
    for group in ("seen", "unseen"):
        part = line[group]
        categories = {f"  {name}": means for name, means in part["by_category"].items()}
        for label, means in {
            f"{group}, mean over clients": part["mean"],
            f"{group}, weighted by examples": part["weighted"],
            **categories,
        }.items():
            cells = "".join(f"{means[n]:>24.4f}" if n in means else f"{'':>24}" for n in names)
            rows.append(
                f"{label[:34]:34}{'' if label in categories else part['clients']:>8}{cells}"
            )
    return "\n".join(rows)
