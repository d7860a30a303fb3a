"""Server memory: the identity, every wire, full view, fold, and the overshoot it warns of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference
import torch
from cohorts import LARGE, MIXED, SHAPES, SMALL, R, collect, effective, first_state, nothing, play

from flexlora.adapter import LoraSpec
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


@pytest.mark.parametrize(("fold", "times"), [(False, 2.0), (True, 1.0)])
def test_without_fold_a_small_client_adds_the_tail_a_second_time(fold, times):
    """The overshoot: its data ask for a direction that G has, beyond the rank it can see."""
    method = make("flexlora-memory", fold=fold)
    client = replace(SMALL, lora=LoraSpec(1, lora_alpha=6))
    U = {m: torch.eye(o, R[m], dtype=torch.float64) for m, (o, i) in SHAPES.items()}
    Vh = {m: torch.eye(R[m], i, dtype=torch.float64) for m, (o, i) in SHAPES.items()}
    S = torch.tensor([5.0, 3.0, 0.0, 0.0], dtype=torch.float64)
    G = {m: LowRank(U[m] * S[: R[m]], Vh[m]) for m in SHAPES}

    def learns_what_it_lacks(payload):
        trained = {}
        for m, d in payload.adapter.items():
            direction = Vh[m][1]
            seen = sum((t.dense() for t in payload.frozen.get(m, ())), d.dense()) @ direction
            missing = U[m][:, 1] * 3 - seen
            B, A = missing[:, None] / d.scaling, direction[None]
            trained[m] = LowRank(B, A, d.scaling) if missing.norm() > 1e-9 else d
        return trained

    state = replace(first_state(method), G=G)
    after = play(method, 1, (client,), learns_what_it_lacks, state)
    for m in SHAPES:
        at_direction = U[m][:, 1] @ after.G[m].dense() @ Vh[m][1]
        torch.testing.assert_close(at_direction.item(), times * 3.0)


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
