"""Rounds that survive a kill at any moment: what counts is on the disk before it counts.

In one round, in this order, each step whole or absent: who is invited (`cohorts/`), every answer as
it comes (`inbox/`), the line of `metrics.jsonl`, the round's lines in `ledger.jsonl`, the
checkpoint. After a kill the loop goes on from the last checkpoint; the same round is played with
the same people, stored answers are not asked for again, and a round that the ledger has closed is
made of exactly the updates it names and must come to the state it names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from flexlora.adapter import LoraSpec
from flexlora.engines.flower.durable import Durable
from flexlora.engines.flower.replay import store
from flexlora.experiment import runs
from flexlora.experiment.checkpoints import (
    Progress,
    checkpoints,
    load_checkpoint,
    pack,
    prune,
    save_checkpoint,
)
from flexlora.experiment.errors import RUN, Failure, blame
from flexlora.federation import ledger
from flexlora.federation.round import RoundRecord, Rules, run_round
from flexlora.federation.spool import Spool
from flexlora.federation.state import Client, Method, ServerState

SPOOL_BYTES = 1 << 30
KEPT = 2
"""Checkpoints."""

Invite = Callable[[ServerState], Sequence[Client]]
"""Who takes part in the round after a state; asked once a round, whatever is killed."""


def rounds(
    folder: Path,
    method: Method,
    first: ServerState,
    invite: Invite,
    engine: Durable,
    last: int,
    rules: Rules | None = None,
) -> Iterator[tuple[ServerState, RoundRecord]]:
    """Every round that is left of a run, each on the disk before it is handed out.

    Args:
        folder: of the run.
        method: the server's rule.
        first: the state before round 1; the same in every sitting.
        invite: who takes part.
        engine: stores answers in the run's `inbox`.
        last: the last round.
        rules: what is admitted.

    Raises:
        Failure: a ledger that was changed, or a state that does not follow from it.
    """
    path = folder / "ledger.jsonl"
    with blame(RUN, "ledger"):
        ledger.cut(path)
        engine.closed = ledger.admitted(path)
        states = {row["round"]: row["state"] for row in ledger.read(path) if "closed" in row}
    state, progress = last_saved(folder, first)
    runs.cut_metrics(folder, progress.metrics_bytes)
    spool = Spool(SPOOL_BYTES, folder / "spool")
    while state.round < last:
        cohort = _cohort(folder, state, invite)
        state, record = run_round(method, state, cohort, engine, spool, rules)
        runs.append_metrics(folder, "round", record.to_json())
        found = fingerprint(state)
        if states.setdefault(state.round, found) != found:
            raise Failure(
                f"round {state.round}: the ledger names state {states[state.round][:12]}, its "
                f"updates give {found[:12]}. Go on with the machine, threads and versions that "
                "the round was closed with.",
                RUN,
            )
        if state.round not in engine.closed:
            lines = ledger.entries(record, engine.received)
            ledger.append(path, state.round, lines, found)
        ranks = {c: row["ranks"] for c, row in record.clients.items()}
        progress = replace(progress, ranks=dict(sorted({**progress.ranks, **ranks}.items())))
        progress = save(folder, state, progress)
        engine.forget(state.round)
        (folder / "cohorts" / f"round-{state.round:05d}.json").unlink(missing_ok=True)
        yield state, record


def last_saved(folder: Path, first: ServerState) -> tuple[ServerState, Progress]:
    """Where a run stands."""
    saved = checkpoints(folder / "checkpoints")
    return load_checkpoint(saved[-1]) if saved else (first, Progress())


def save(folder: Path, state: ServerState, progress: Progress) -> Progress:
    """A checkpoint with the metrics that belong to it."""
    progress = replace(progress, metrics_bytes=runs.metrics_size(folder))
    save_checkpoint(folder / "checkpoints", state, progress)
    prune(folder / "checkpoints", KEPT, 0)
    return progress


def fingerprint(state: ServerState) -> str:
    """SHA-256 over everything in a state."""
    tensors, rest = pack(state)
    found = hashlib.sha256(json.dumps(rest).encode())
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _cohort(folder: Path, state: ServerState, invite: Invite) -> list[Client]:
    """The round's people: as written down, or invited now and written down."""
    path = folder / "cohorts" / f"round-{state.round + 1:05d}.json"
    if not path.is_file():
        store(path, json.dumps([asdict(c) for c in invite(state)]).encode())
    return [
        Client(**{**row, "lora": LoraSpec(**row["lora"])}) for row in json.loads(path.read_bytes())
    ]
