"""Every method goes through the same round: sent, trained, admitted, aggregated, recorded."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from federation.quadratic import people, start

from flexlora.federation.round import run_round
from flexlora.federation.spool import Spool
from flexlora.federation.state import Update
from flexlora.lowrank import LowRank
from flexlora.methods import make, methods


@dataclass(frozen=True)
class Nudge:
    """Moves what a payload says is trained, by a little."""

    def train(self, payloads, clients) -> Iterator[Update]:
        for p in payloads:
            g = torch.Generator().manual_seed(clients[p.client].num_examples + p.round)

            def moved(x, name, p=p, g=g):
                trained = name in p.train and name not in p.keep
                return x + 0.1 * torch.randn(x.shape, generator=g) if trained else x

            adapter = {
                m: LowRank(moved(d.B, "B"), moved(d.A, "A"), d.scaling)
                for m, d in p.adapter.items()
            }
            yield Update(p.client, p.round, p.base, adapter, clients[p.client].num_examples)


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", methods)
def test_three_rounds(name, wire, tmp_path):
    method = make(name)
    clients = people([3, 5, 5, 9] if method.mixed_ranks else [5, 5, 5, 5])
    state = method.start(start(clients, wire=wire))
    for round in range(1, 4):
        state, record = run_round(method, state, clients, Nudge(), Spool(0, tmp_path))
        assert (state.round, len(record.clients)) == (round, 4), record.refused
        assert record.bytes_up > 0
        json.dumps(record.to_json())
    assert all(row["update_norm"] > 0 for row in record.clients.values())
    assert state.aux["admission.norms"].shape == (12,)
