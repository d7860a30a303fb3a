"""Every method through the embedded engine: what payloads ask for is what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bank_cases import TARGETS, base_of

from flexlora.adapter import LoraSpec, initial_adapter, select
from flexlora.data.task import Example, Task
from flexlora.engines.embedded import Embedded, Prompting
from flexlora.federation.run import Schedule, run
from flexlora.federation.spool import Spool
from flexlora.federation.state import Client, ServerState
from flexlora.methods import make, methods
from flexlora.training.client import LocalTraining

ROUNDS = 3


@pytest.mark.parametrize("name", sorted(methods))
def test_runs_and_learns(name: str, tmp_path: Path) -> None:
    base, method = base_of(torch.float32), make(name)
    ranks = (2, 4, 8) if method.mixed_ranks else (4, 4, 4)
    clients = [Client(f"c{n}", LoraSpec(r, lora_alpha=8), 4) for n, r in enumerate(ranks)]
    rows = [Example(f"say {n}", "", "yes") for n in range(4)]
    tasks = {
        c.id: Task(c.id, "t", "", {"train": 4, "eval": 0, "test": 0}, lambda split: rows)
        for c in clients
    }
    shapes = {m: base.shapes[m] for m in select(base.shapes, TARGETS)}
    start = initial_adapter(shapes, dict.fromkeys(shapes, max(ranks)), 0)
    state = method.start(ServerState(0, base.fingerprint, start))
    training = LocalTraining(learning_rate=1e-2, max_steps=4, per_device_train_batch_size=2)
    engine = Embedded(base, tasks, training, prompting=Prompting(max_length=64))
    setting = "cross-device" if method.stateless else "cross-silo"
    schedule = Schedule(ROUNDS, len(clients), setting=setting)
    records = [
        r for _, r in run(method, state, clients, engine, schedule, Spool(1 << 28, tmp_path))
    ]
    assert not any(r.refused for r in records)
    assert all(len(r.clients) == 3 for r in records)
    assert records[-1].metrics["loss_last"] < records[0].metrics["loss_first"]
    assert bool(engine.memory) == (not method.stateless)
