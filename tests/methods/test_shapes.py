"""The rules at any shapes, ranks, sizes and scalings, and where ranks are degenerate."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.adapter import AlphaRule, LoraSpec, initial_adapter
from flexlora.federation.spool import Spool
from flexlora.federation.state import Client, ServerState, Update
from flexlora.lowrank import LowRank
from flexlora.methods import make

MIXED_RULES = ["flexlora", "flexlora-memory", "raflora", "rbla", "ffa-lora", "rolora", "flora"]
RULES: list[AlphaRule] = ["fixed", "rslora", "proportional"]


@st.composite
def federations(draw):
    """Shapes of two modules, and clients with a rank for each."""
    shapes = {m: (draw(st.integers(1, 8)), draw(st.integers(1, 8))) for m in ("x", "y")}
    ranks = {m: st.integers(1, min(s)) for m, s in shapes.items()}
    clients = [
        Client(
            f"c{i}",
            LoraSpec(
                {m: draw(r) for m, r in ranks.items()},
                draw(st.floats(0.5, 32)),
                draw(st.sampled_from(RULES)),
            ),
            num_examples=draw(st.integers(1, 500)),
        )
        for i in range(draw(st.integers(1, 4)))
    ]
    return shapes, clients


def trained(payload, seed):
    """Noise on the factors that are trained; some clients come back with a degenerate rank."""
    random = torch.Generator().manual_seed(seed)
    adapter = {}
    for m, d in payload.adapter.items():
        B, A = (torch.randn(x.shape, generator=random, dtype=torch.float64) for x in (d.B, d.A))
        B[:, -1] = B[:, 0] if seed % 3 == 0 else B[:, -1]
        A[-1] = 0 if seed % 5 == 0 else A[-1]
        adapter[m] = LowRank(
            d.B + B if "B" in payload.train else d.B,
            d.A + A if "A" in payload.train else d.A,
            d.scaling,
        )
    return adapter


@pytest.mark.parametrize("name", MIXED_RULES)
@settings(deadline=None, max_examples=25)
@given(federations(), st.integers(0, 99))
def test_three_rounds_equal_the_dense_rule(name, federation, seed):
    shapes, clients = federation
    method = make(name)
    ranks = {m: max(c.lora.rank(m) for c in clients) for m in shapes}
    G = {m: d.to(torch.float64) for m, d in initial_adapter(shapes, ranks, seed).items()}
    state = method.start(ServerState(0, "base", G, seed=seed))
    for round in range(3):
        updates = Spool(1 << 30, Path(tempfile.gettempdir()))
        for i, client in enumerate(clients):
            payload = method.downlink(state, client)
            adapter = trained(payload, seed + 7 * i + round)
            updates.add(Update(client.id, payload.round, "base", adapter, client.num_examples))
        before, state = state, method.aggregate(state, updates)
        for m in shapes:
            expected = reference.RULES[name](before, m, updates.module(m), updates.weights)
            got = method.view(state, None)[m].dense() + reference.patch_of(state, m)
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
            assert state.G[m].rank == ranks[m]


@settings(deadline=None, max_examples=25)
@given(federations(), st.sampled_from(["B", "balanced", "A"]))
def test_a_degenerate_global_still_gives_every_row_something_to_train(federation, split):
    """With B = 0 everywhere, the SVD is all zero: rows must not be."""
    shapes, clients = federation
    method = make("flexlora", split=split)
    ranks = {m: max(c.lora.rank(m) for c in clients) for m in shapes}
    state = ServerState(0, "base", initial_adapter(shapes, ranks, 0))
    updates = Spool(1 << 30, Path(tempfile.gettempdir()))
    for client in clients:
        payload = method.downlink(state, client)
        updates.add(Update(client.id, 1, "base", payload.adapter, client.num_examples))
    state = method.aggregate(state, updates)
    for client in clients:
        for m, d in method.downlink(state, client).adapter.items():
            assert d.rank == client.lora.rank(m)
            torch.testing.assert_close(d.A @ d.A.T, torch.eye(d.rank), atol=1e-5, rtol=0)
            assert not d.B.any()
