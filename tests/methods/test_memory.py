"""Server memory: the identity, every wire, full view, fold, and the overshoot it warns of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference
import torch
from cohorts import LARGE, MIXED, SHAPES, collect, effective, first_state, nothing, play

from flexlora.lowrank import LowRank
from flexlora.methods import make


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["flexlora-memory", "raflora", "rbla", "flora"])
def test_a_round_without_training_is_a_no_op_through_every_wire(name, wire):
    method = make(name)
    state = play(method, 2, state=replace(first_state(method), wire=wire))
    after = play(method, 1, train=nothing, state=state)
    for m in SHAPES:
        torch.testing.assert_close(
            effective(after, method)[m], effective(state, method)[m], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_what_is_sent_is_what_the_wire_can_carry(wire):
    method = make("flexlora")
    state = replace(play(method, 2), wire=wire)
    for d in method.downlink(state, LARGE).adapter.values():
        assert torch.equal(d.B.to(getattr(torch, wire)).to(d.B.dtype), d.B)
        assert torch.equal(d.A.to(getattr(torch, wire)).to(d.A.dtype), d.A)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_at_full_view_the_step_goes_to_the_mean_product(eta):
    """Everyone at the server's rank, and that the full one: G is never truncated."""
    method = make("flexlora-memory", eta=eta)
    full = {m: min(s) for m, s in SHAPES.items()}
    clients = [replace(c, lora=replace(c.lora, r=full)) for c in MIXED]
    state = first_state(make("flexlora-memory", server_rank=9))
    assert {m: d.rank for m, d in state.G.items()} == full
    for _ in range(3):
        updates = collect(method, state, clients)
        before, state = state, method.aggregate(state, updates)
        for m in SHAPES:
            mean = reference.mean_product(updates.module(m), updates.weights)
            old = before.G[m].dense()
            torch.testing.assert_close(state.G[m].dense(), old + eta * (mean - old))


def test_a_larger_server_rank_hands_out_the_same_heads_at_first():
    wide, plain = make("flexlora-memory", server_rank=4), make("flexlora-memory")
    for client in MIXED:
        x, y = (m.downlink(first_state(m), client).adapter for m in (wide, plain))
        assert all(torch.equal(x[m].A, y[m].A) for m in SHAPES)


def test_fold_sends_the_rest_of_G_frozen():
    method = make("flexlora-memory", fold=True)
    state = play(method, 2)
    for client in MIXED:
        payload = method.downlink(state, client)
        for m, d in payload.adapter.items():
            whole = d.dense() + sum(t.dense() for t in payload.frozen.get(m, ()))
            torch.testing.assert_close(whole, state.G[m].dense())
            assert (m in payload.frozen) == (d.rank < state.G[m].rank)
            torch.testing.assert_close(method.view(state, client)[m].dense(), whole)


def towards(target):
    """Local training that reaches the best update of its rank for what it can see."""

    def train(payload):
        trained = {}
        for m, d in payload.adapter.items():
            seen = sum((t.dense() for t in payload.frozen.get(m, ())), torch.zeros(1).double())
            U, S, Vh = torch.linalg.svd(target[m] - seen, full_matrices=False)
            B = U[:, : d.rank] * S[: d.rank] / d.scaling
            trained[m] = LowRank(B, Vh[: d.rank], d.scaling)
        return trained

    return train


def test_without_fold_small_clients_add_the_tail_again():
    """The overshoot: a small client whose best head is not G's own head adds what G already has."""
    target = {
        m: torch.diag(torch.ones(9, dtype=torch.float64))[:o, :i] for m, (o, i) in SHAPES.items()
    }
    flat = {m: t * torch.arange(9, 9 - t.shape[1], -1).double() for m, t in target.items()}
    ends = {}
    for fold in (False, True):
        method = make("flexlora-memory", fold=fold)
        state = play(method, 1, train=towards(flat))
        turned = {m: t.flip(1) for m, t in flat.items()}  # the task turns: heads no longer fit
        for _ in range(4):
            state = play(method, 1, train=towards(turned), state=state)
        ends[fold] = sum(float((state.G[m].dense() - turned[m]).norm()) for m in SHAPES)
    assert ends[True] < ends[False]


def test_collapse_and_its_remedy():
    """Ten rounds without training: FlexLoRA keeps q_j^10 of a direction, memory all of it."""
    for name, kept in (("flexlora", (8 / 11) ** 10), ("flexlora-memory", 1.0)):
        method = make(name)
        start = play(method, 2)
        end = play(method, 10, train=nothing, state=start)
        before, after = (s.G["q"].B.norm(dim=0) for s in (start, end))
        torch.testing.assert_close(after[:2], before[:2], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(after[2:], kept * before[2:], rtol=1e-9, atol=1e-9)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="eta is 0"):
        make("flexlora-memory", eta=0)
    with pytest.raises(ValueError, match="server_rank is 0"):
        make("flexlora-memory", server_rank=0)
