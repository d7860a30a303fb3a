"""The package's rules, fed by the same hand-written local steps, equal the plain-loop example."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import torch

from flexlora.adapter import LoraSpec
from flexlora.federation.spool import Spool
from flexlora.federation.state import Client, ServerState, Update
from flexlora.lowrank import LowRank
from flexlora.methods import make

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "flexlora_by_hand.py"


def load_example():
    spec = importlib.util.spec_from_file_location("flexlora_by_hand", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_package_equals_the_example(capsys):
    hand = load_example()
    expected = hand.main()
    base, server, data = hand.make_problem()
    method = make("flexlora")
    clients = [
        Client(str(k), LoraSpec(r, hand.ALPHA), n)
        for k, (r, n) in enumerate(zip(hand.RANKS, hand.EXAMPLES, strict=True))
    ]
    state = ServerState(0, "base", {m: LowRank(U * S, Vh) for m, (U, S, Vh) in server.items()})
    for round in range(1, hand.ROUNDS + 1):
        updates = Spool(1 << 30, Path(tempfile.gettempdir()))
        for k in hand.cohort_of(round):
            sent = method.downlink(state, clients[k])
            factors = {m: (d.B, d.A) for m, d in sent.adapter.items()}
            trained = hand.train(base, factors, hand.RANKS[k], *data[k])
            adapter = {m: LowRank(*trained[m], sent.adapter[m].scaling) for m in trained}
            updates.add(Update(clients[k].id, round, "base", adapter, clients[k].num_examples))
        state = method.aggregate(state, updates)
    for m, (U, S, Vh) in expected.items():
        assert torch.allclose(state.G[m].dense(), (U * S) @ Vh, rtol=0, atol=1e-9)
    assert "round 10" in capsys.readouterr().out


def test_training_by_hand_lowers_every_loss(capsys):
    hand = load_example()
    hand.main()
    lines = capsys.readouterr().out.splitlines()
    first, last = (
        [float(v) for v in line.split(": ")[1].split()] for line in (lines[0], lines[-1])
    )
    assert all(b < 0.7 * a for a, b in zip(first, last, strict=True))
