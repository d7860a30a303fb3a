"""SLoRA's two stages, full fine-tuning, and warm starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference
import torch
from cohorts import EQUAL, MIXED, SHAPES, SMALL, R, collect, effective, first_state, noise, play

from flexlora.adapter import initial_adapter
from flexlora.lowrank import LowRank
from flexlora.methods import make

MIXED_SLORA = make("slora", of="flexlora", rounds=2, density=0.4)


def test_the_switch_turns_the_change_into_the_adapter_once():
    one = play(MIXED_SLORA, 1, MIXED)
    updates = collect(MIXED_SLORA, one, MIXED)
    two = MIXED_SLORA.aggregate(one, updates)
    assert not two.patch
    for m in SHAPES:
        change = reference.sparse(one, m, updates.module(m), updates.weights)
        torch.testing.assert_close(
            effective(two, MIXED_SLORA)[m], reference.trunc(change, two.G[m].rank)
        )
        for client in MIXED:
            torch.testing.assert_close(
                effective(two, MIXED_SLORA, client)[m],
                reference.trunc(change, client.lora.rank(m)),
            )
    three = MIXED_SLORA.downlink(two, SMALL)
    assert (three.train, three.mask, three.frozen) == ("AB", {}, {})


def test_stage_1_sends_every_client_the_same_entries_and_their_values():
    state = play(MIXED_SLORA, 1, MIXED)
    x, y = (MIXED_SLORA.downlink(state, c) for c in MIXED)
    assert (x.train, x.mask, x.frozen) == ("B", y.mask, {})
    for m, mask in x.mask.items():
        assert mask.count == round(0.4 * SHAPES[m][0] * SHAPES[m][1])
        sent = mask.dense(x.adapter[m].B[:, 0])
        torch.testing.assert_close(sent, effective(state, MIXED_SLORA)[m])
        assert not state.G[m].B.any()


def test_stage_2_is_the_wrapped_rule():
    method = make("slora", of="fedavg", rounds=1)
    state = play(method, 1)
    x, y = (play(m, 2, EQUAL, noise, state) for m in (method, make("fedavg")))
    assert all(torch.equal(x.G[m].B, y.G[m].B) for m in SHAPES)


def test_full_fine_tuning_moves_every_entry():
    method = make("full")
    state = play(method, 1)
    assert all(effective(state, method)[m].ne(0).all() for m in SHAPES)


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_a_density_outside_its_range_is_refused(density):
    method = make("slora", density=density)
    with pytest.raises(ValueError, match="density"):
        method.downlink(first_state(method), SMALL)


def warm(method):
    """A start from an adapter there is."""
    state = first_state(make("flexlora"))
    random = torch.Generator().manual_seed(3)

    def draw(x):
        return torch.randn(x.shape, generator=random, dtype=x.dtype)

    G = {m: LowRank(draw(d.B), draw(d.A)) for m, d in state.G.items()}
    return G, method.start(replace(state, G=G))


@pytest.mark.parametrize("name", ["flora", "ffa-lora", "fedsa-lora", "flexlora", "rbla", "full"])
def test_a_warm_start_is_the_model_everyone_starts_from(name):
    method = make(name)
    G, state = warm(method)
    for m in SHAPES:
        torch.testing.assert_close(effective(state, method)[m], G[m].dense())


def test_slora_refuses_a_warm_start():
    with pytest.raises(ValueError, match="warm start is refused"):
        warm(make("slora"))


@pytest.mark.parametrize("name", ["flora", "ffa-lora", "fedsa-lora"])
@pytest.mark.parametrize("rounds", [0, 2])
def test_what_a_client_is_said_to_know_it_can_draw_itself(name, rounds):
    method = make(name)
    _, state = warm(method)
    payload = method.downlink(play(method, rounds, MIXED, state=state), SMALL)
    drawn = initial_adapter(SHAPES, {m: SMALL.lora.rank(m) for m in R}, payload.seed)
    for m, d in payload.adapter.items():
        if "A" in payload.known:
            assert torch.equal(d.A, drawn[m].A.double())
        if "B" in payload.known:
            assert not d.B.any()
