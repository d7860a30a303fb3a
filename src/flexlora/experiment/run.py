"""A run from start to end, and from a checkpoint to the end: a straight path with plain lines."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from flexlora.engines.flower.answers import Coded
from flexlora.experiment import runs
from flexlora.experiment.bounds import alone, bounded
from flexlora.experiment.build import BOUNDS
from flexlora.experiment.checkpoints import (
    Progress,
    checkpoints,
    load_checkpoint,
    load_memory,
    prune,
    save_checkpoint,
)
from flexlora.experiment.config import Config
from flexlora.experiment.console import Clock, Console, stopwatch
from flexlora.experiment.errors import DATA, blame
from flexlora.experiment.evaluation import (
    BASE,
    View,
    global_view,
    measure,
    measure_own,
    note,
    sample_answers,
)
from flexlora.experiment.export import save_adapter
from flexlora.experiment.initial import first_state
from flexlora.experiment.plots import plot_loss
from flexlora.experiment.samples import describe_samples, read_samples, write_samples
from flexlora.experiment.summary import (
    describe,
    introduction,
    round_line,
    summarise,
)
from flexlora.experiment.trackers import Log, require, trackers
from flexlora.experiment.workshop import Workshop, open_workshop, settle, settled
from flexlora.federation import run as federation
from flexlora.federation.round import RoundRecord
from flexlora.federation.spool import Spool
from flexlora.federation.state import ServerState

SPOOL_BYTES = 1 << 30
"""Updates of a round beyond this go to disk."""


def start(
    config: Config, name: str, console: Console, like: Workshop | None = None
) -> dict[str, Any]:
    """A new run in a directory of its own; returns its summary.

    Args:
        config: checked.
        name: of the recipe, for the directory.
        console: where people read.
        like: an open workshop, whose base model and data are used again where they are the same.

    Raises:
        Failure: anything a user can act on.
    """
    clock = stopwatch()
    require(config.report_to)
    shop = bounded(open_workshop(config, Path(), console, like))
    state = first_state(shop.experiment, shop.base.fingerprint)
    shop = replace(shop, folder=runs.create(config, name))
    runs.identify(shop.folder, shop.base.name, shop.base.fingerprint)
    return _begin(shop, state, clock)


def proceed(folder: Path, console: Console, like: Workshop | None = None) -> dict[str, Any]:
    """Take a run up at its last checkpoint; a finished one only returns its summary.

    Raises:
        Failure: not a run, another base model, or a checkpoint that cannot be read.
    """
    clock, config = stopwatch(), runs.open_run(folder)
    if (folder / "summary.json").is_file():
        summary = runs.read(folder / "summary.json")
        console.say(f"{folder} is finished.\n\n{describe(summary)}")
        return summary
    shop = bounded(open_workshop(config, folder, console, like))
    runs.identify(folder, shop.base.name, shop.base.fingerprint)
    saved = checkpoints(folder / "checkpoints")
    if not saved:  # killed before anything was trained
        runs.cut_metrics(folder, 0)
        return _begin(shop, first_state(shop.experiment, shop.base.fingerprint), clock)
    state, progress = load_checkpoint(saved[-1])
    runs.cut_metrics(folder, progress.metrics_bytes)
    console.say(f"{folder}: going on after round {state.round}")
    shop = settled(shop, progress.sizes)
    shop.engine.restore(load_memory(saved[-1]))
    return _go_on(shop, state, progress, stopwatch(progress.seconds + clock()))


def _begin(shop: Workshop, state: ServerState, clock: Clock) -> dict[str, Any]:
    """Say what is to come, measure the base model, save round 0, and go on from there."""
    wanted, say = shop.experiment.config.evaluation, shop.console.say
    shop = settled(shop, settle(shop, state))
    say(introduction(shop))
    with blame(DATA, "evaluation"):
        samples = sample_answers(shop, BASE, wanted.samples)
        write_samples(shop.folder, before=samples)
        if samples:
            say(f"\nThe base model, before any training:\n\n{describe_samples(samples)}\n")
        note(shop, measure(shop, BASE, "test", wanted.metrics, wanted.max_clients))
        _on_the_way(shop, BASE)
    progress = _save(shop, state, Progress(), clock)
    return _go_on(shop, state, progress, clock)


def _go_on(shop: Workshop, state: ServerState, progress: Progress, clock: Clock) -> dict[str, Any]:
    """The rounds that are left, the last evaluation, the exports and the summary."""
    if shop.experiment.config.method.name == "local-only":
        return alone(shop, state, clock)
    e, folder, wanted = shop.experiment, shop.folder, shop.experiment.config.evaluation
    with trackers(e.config.report_to, folder, e.config.model_dump(mode="json")) as log:
        with blame(DATA, "training", (ValueError,)):
            state, progress = _rounds(shop, state, progress, clock, log)
        if e.config.checkpoints.load_best_at_end and progress.best_round:
            state, _ = load_checkpoint(folder / f"checkpoints/round-{progress.best_round:05d}")
        view = global_view(shop, state)
        after = measure(shop, view, "test", wanted.metrics, wanted.max_clients)
        own = measure_own(shop, state, wanted.max_clients)
        for line in (after, own):
            note(shop, line, log)
    samples = read_samples(folder)
    later = sample_answers(shop, view, wanted.samples)
    write_samples(folder, before=samples, after=later)
    save_adapter(folder / "adapters" / "global", e.method, state, shop.base.name)
    plot_loss(folder)
    before = next(m for m in runs.read_metrics(folder) if m["kind"] == "evaluation")
    summary = summarise(
        folder,
        before,
        after,
        seconds=round(clock(), 1),
        rounds=state.round,
        method=e.config.method.name,
        own_rank_loss=own["seen"]["mean"].get("loss"),
        ranks=dict(sorted({**own["ranks"], **progress.ranks}.items())),
    )
    runs.write(folder / "summary.json", json.dumps(summary, indent=2))
    shop.console.rest()
    shop.console.say(f"\n{describe(summary)}\n\n{describe_samples(samples, later)}\n")
    shop.console.say(f"{folder}: metrics.jsonl, adapters/global (PEFT), loss.svg")
    return summary


def _rounds(
    shop: Workshop, state: ServerState, progress: Progress, clock: Clock, log: Log
) -> tuple[ServerState, Progress]:
    """Round after round: train, record, evaluate, save; to the last, or until it stops paying."""
    e, folder, kept = shop.experiment, shop.folder, shop.experiment.config.checkpoints
    clients, spool = list(e.clients.values()), Spool(SPOOL_BYTES, folder / "spool")
    patience = kept.early_stopping_patience or math.inf
    if progress.stale >= patience:
        return state, progress
    wire = e.config.federation.wire
    travels = wire != "float32" and e.config.method.name not in BOUNDS
    engine = Coded(shop.engine, wire) if travels else shop.engine  # as over a network
    rounds = federation.run(e.method, state, clients, engine, e.schedule, spool)
    for state, record in rounds:
        line = record.to_json() | effort(record)
        runs.append_metrics(folder, "round", line)
        log(line, state.round)
        shop.console.say(round_line(record, e.schedule.rounds, clock()))
        ranks = {c: row["ranks"] for c, row in record.clients.items()}
        progress = replace(progress, ranks=dict(sorted({**progress.ranks, **ranks}.items())))
        last = state.round == e.schedule.rounds
        if last or state.round % (e.config.evaluation.every or e.schedule.rounds + 1) == 0:
            loss = _on_the_way(shop, global_view(shop, state), log)
            progress = better_or_stale(progress, state.round, loss)
        stop = progress.stale >= patience
        if stop or last or state.round % kept.save_every == 0 or progress.best_round == state.round:
            progress = _save(shop, state, progress, clock)
        if stop:
            shop.console.say(
                f"stopping early: {progress.stale} evaluations without a lower loss on the "
                f"monitored clients; the lowest was in round {progress.best_round}"
            )
            break
        if state.round == 1:
            _first_answer(shop, state)
    return state, progress


def effort(record: RoundRecord) -> dict[str, float]:
    """Tokens a second while training, and the most memory this process has taken so far."""
    tokens = sum(row["metrics"].get("tokens", 0.0) for row in record.clients.values())
    rates = {"tokens_per_second": tokens / max(record.seconds.get("train", 0.0), 1e-9)}
    if torch.cuda.is_available():
        return rates | {"peak_memory_bytes": torch.cuda.max_memory_allocated()}
    memory = psutil.Process().memory_info()
    return rates | {"peak_memory_bytes": getattr(memory, "peak_wset", None) or high_water(memory)}


def high_water(memory: Any) -> int:
    """Peak resident bytes where the system keeps them, otherwise what is resident now."""
    try:
        import resource
    except ImportError:  # Windows
        return int(memory.rss)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _on_the_way(shop: Workshop, view: View, log: Log | None = None) -> float | None:
    """Measure the fixed set of clients on its `eval` split; the seen ones' mean loss, if any."""
    config = shop.experiment.config
    if not config.evaluation.every:
        return None
    metrics, limit = config.evaluation.metrics_on_the_way, config.checkpoints.monitor_clients
    line = measure(shop, view, "eval", metrics, limit)
    note(shop, line, log)
    loss: float | None = line["seen"]["mean"].get("loss")
    return loss


def better_or_stale(progress: Progress, round: int, loss: float | None) -> Progress:
    """What an evaluation says about the best round so far.

    >>> first = better_or_stale(Progress(), 5, 1.0)
    >>> first.best_round, better_or_stale(first, 10, 1.2).stale
    (5, 1)
    """
    if loss is None:
        return progress
    if progress.best_loss is None or loss < progress.best_loss:
        return replace(progress, best_round=round, best_loss=loss, stale=0)
    return replace(progress, stale=progress.stale + 1)


def _save(shop: Workshop, state: ServerState, progress: Progress, clock: Clock) -> Progress:
    """A checkpoint that a resume goes on from, with the length of the metrics that belong to it."""
    kept, folder = shop.experiment.config.checkpoints, shop.folder / "checkpoints"
    progress = replace(
        progress,
        metrics_bytes=runs.metrics_size(shop.folder),
        seconds=clock(),
        sizes=settle(shop, state),  # tokens per forward may have been halved since
    )
    save_checkpoint(folder, state, progress, shop.engine.memory)
    prune(folder, kept.save_total_limit, progress.best_round)
    return progress


def _first_answer(shop: Workshop, state: ServerState) -> None:
    """One answer after one round, so that a newcomer sees something move."""
    for sample in sample_answers(shop, global_view(shop, state), 1):
        answer = " ".join(sample["answer"].split())
        shop.console.say(f"  [{sample['client']}] after one round answers: {answer[:200]}")
