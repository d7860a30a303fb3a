"""What a federation lies between: every client by itself, and all data in one place.

Neither is a round method. Both train on as many examples as the federation would, at the same
settings, so that what differs is who shares with whom.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flexlora.adapter import LoraSpec, load_peft, save_peft
from flexlora.data.task import Example, Population, Split, Task
from flexlora.experiment import runs
from flexlora.experiment.build import Experiment
from flexlora.experiment.checkpoints import flush
from flexlora.experiment.console import Clock
from flexlora.experiment.errors import DATA, RUN, Failure, blame
from flexlora.experiment.evaluation import CLIENTS_AT_ONCE, ask, note, sample, table
from flexlora.experiment.summary import describe, summarise
from flexlora.experiment.workshop import Workshop
from flexlora.federation.admission import Refusal
from flexlora.federation.ranks import Ranks
from flexlora.federation.run import Schedule
from flexlora.federation.state import Client, ServerState, Update, ranks_of
from flexlora.training.client import LocalTraining
from flexlora.training.evaluate import Scores

POOL = "all-clients"

TOKENS = "tokens.json"
"""Beside a client's own adapter: how many it was trained on."""


def bounded(shop: Workshop) -> Workshop:
    """The workshop of the `centralised` bound where that is asked for, otherwise the same."""
    if shop.experiment.config.method.name != "centralised":
        return shop
    e = centralised(shop.experiment)
    engine = replace(shop.engine, population=e.population, training=e.training)
    return replace(shop, experiment=e, engine=engine)


def centralised(e: Experiment) -> Experiment:
    """All seen clients' data as one client at the largest rank, with a cohort's examples a round.

    The optimiser is reset every round, as every client's is.
    """
    task = pooled(e.population, e.seen)
    ranks = {m: max(c.lora.rank(m) for c in e.clients.values()) for m in e.shapes}
    uniform, lora = len(set(ranks.values())) == 1, e.config.lora
    r: Ranks = max(ranks.values()) if uniform else ranks
    spec = LoraSpec(r, lora.lora_alpha, lora.alpha_rule)
    client = Client(POOL, spec, task.sizes["train"], task.task, task.category)
    draws = [e.training.draws(c.num_examples) for c in e.clients.values()]
    steps = ceil(sum(draws) / len(draws) * e.schedule.cohort_size / e.training.batch_size)
    return replace(
        e,
        population={**e.population, POOL: task},
        clients={POOL: client},
        schedule=Schedule(e.schedule.rounds, 1),
        training=replace(e.training, max_steps=steps),
        notes=(*e.notes, f"centralised: {steps} steps a round on the data of all seen clients"),
    )


def pooled(population: Population, clients: Sequence[str]) -> Task:
    """One task that holds the examples of several, client after client."""

    def load(split: Split) -> list[Example]:
        return [example for c in clients for example in population[c].load(split)]

    train = sum(population[c].sizes.get("train", 0) for c in clients)
    return Task(POOL, "all tasks", "", {"train": train}, load)


def alone(shop: Workshop, state: ServerState, clock: Clock) -> dict[str, Any]:
    """Every client by itself, for its share of the federation's examples; the run's summary.

    Adapters are saved under `adapters/clients/` one by one, and what is there is not trained again:
    that is how such a run is resumed. Unseen clients have no model of their own.

    Raises:
        Failure: a client that cannot train, or the disk is full or not writable.
    """
    e, root, console = shop.experiment, shop.folder / "adapters" / "clients", shop.console
    folders = {c: root / quote(c, safe="") for c in e.clients}
    engine = replace(shop.engine, training=share(e))
    left = [c for c in e.clients if not folders[c].is_dir()]
    for some in batched(left, e.schedule.cohort_size):
        payloads = [e.method.downlink(state, e.clients[c]) for c in some]
        for update in engine.train(payloads, {c: e.clients[c] for c in some}):
            if isinstance(update, Refusal):
                raise Failure(f"training: {update.message}", DATA)
            left.remove(update.client)
            keep(update, folders[update.client], shop.base.name)
            loss = update.metrics["loss"]
            console.say(
                f"{clock():5.0f} s  {update.client} alone: training loss {loss:.3f}; "
                f"{len(folders) - len(left)} of {len(folders)} clients"
            )
    wanted, found, ranks = e.config.evaluation, dict[str, Scores](), dict[str, list[int]]()
    for some in batched(sample(shop, list(folders), "test", wanted.max_clients), CLIENTS_AT_ONCE):
        views = {c: load_peft(folders[c]) for c in some}
        ranks |= {c: sorted(set(ranks_of(view).values())) for c, view in views.items()}
        found |= ask(shop, views, {}, "test", wanted.metrics)
    line = {"round": 1, "split": "test", "view": "own", "seen": table(e.population, found)}
    note(shop, line)
    rest = {"seconds": round(clock(), 1), "rounds": 1, "method": "local-only", "ranks": ranks}
    rest["tokens"] = {c: json.loads((folders[c] / TOKENS).read_text()) for c in folders}
    summary = summarise(shop.folder, runs.read_metrics(shop.folder)[0], line, **rest)
    runs.write(shop.folder / "summary.json", json.dumps(summary, indent=2))
    console.rest()
    console.say(f"\n{describe(summary)}\n\n{shop.folder}: metrics.jsonl, adapters/clients (PEFT)")
    return summary


def share(e: Experiment) -> LocalTraining:
    """Local settings for one go as long as a client's mean number of visits."""
    visits, training = e.schedule.rounds * e.schedule.cohort_size / len(e.seen), e.training
    if training.max_steps > 0:
        return replace(training, max_steps=max(1, round(training.max_steps * visits)))
    return replace(training, num_train_epochs=training.num_train_epochs * visits)


def keep(update: Update, folder: Path, base: str) -> None:
    """A client's adapter as a PEFT folder, all of it or nothing."""
    scratch = folder.with_name(f".writing-{folder.name}")
    with blame(RUN, f"writing {folder}"):
        save_peft(update.adapter, scratch, base_model=base)
        (scratch / TOKENS).write_text(json.dumps(update.metrics["tokens"]))
        for path in (*scratch.iterdir(), scratch):
            flush(path)
        scratch.rename(folder)


def batched(items: Sequence[str], size: int) -> list[Sequence[str]]:
    """Consecutive pieces of at most `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]
