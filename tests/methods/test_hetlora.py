"""HetLoRA's own rule: ranks shrink where the tail did, and stay shrunk."""

from __future__ import annotations

import pytest
import torch
from cohorts import (
    LARGE,
    MIXED,
    SHAPES,
    SMALL,
    collect,
    first_state,
    nothing,
    play,
)

from flexlora.federation.state import Penalty
from flexlora.lowrank import LowRank
from flexlora.methods import make

HETLORA = make("hetlora", gamma=0.5, penalty=0.1)


def smaller_tail(payload):
    """The large client comes back with a smaller tail, the small one with a larger one."""
    factor = 0.1 if payload.client == LARGE.id else 10.0
    moved = {}
    for m, d in payload.adapter.items():
        B = d.B.clone()
        B[:, max(1, d.rank // 2) :] *= factor
        moved[m] = LowRank(B, d.A, d.scaling)
    return moved


def test_a_rank_shrinks_where_its_tail_did_and_stays_so():
    state = play(HETLORA, 1, MIXED)
    state = play(HETLORA, 1, MIXED, smaller_tail, state)
    large = HETLORA.downlink(state, LARGE).adapter
    small = HETLORA.downlink(state, SMALL).adapter
    assert {m: d.rank for m, d in large.items()} == {"q": 2, "up": 1}
    assert {m: d.rank for m, d in small.items()} == {"q": 2, "up": 1}
    assert large["q"].scaling == pytest.approx(5 / 2**0.5)  # its alpha rule at the new rank
    again = play(HETLORA, 1, (SMALL,), nothing, state)  # a round without it changes nothing
    assert HETLORA.downlink(again, LARGE).adapter["q"].rank == 2


def test_the_pruned_tail_is_not_averaged():
    state = play(HETLORA, 1, MIXED)
    updates = collect(HETLORA, state, MIXED, smaller_tail)
    after = HETLORA.aggregate(state, updates)
    for m in SHAPES:
        large, small = updates.module(m)  # sorted by id
        large = large.prefix(max(1, large.rank // 2))
        norms = [float(d.dense().norm()) for d in (large, small)]
        weights = [n / sum(norms) for n in norms]
        B = sum(w * d.scaling * d.B for w, d in zip(weights, (large, small), strict=True))
        A = sum(w * d.A for w, d in zip(weights, (large, small), strict=True))
        torch.testing.assert_close(after.G[m].B[:, : B.shape[1]], B)
        torch.testing.assert_close(after.G[m].A[: A.shape[0]], A)
        torch.testing.assert_close(after.G[m].B[:, B.shape[1] :], state.G[m].B[:, B.shape[1] :])


def test_the_first_round_prunes_nobody_and_zero_updates_weigh_alike():
    state = play(HETLORA, 1, MIXED, nothing)
    assert state.aux["rank/large"].tolist() == [4, 3]
    assert all(torch.isfinite(d.A).all() for d in state.G.values())


def test_rank_one_is_never_pruned_away():
    state = play(HETLORA, 4, MIXED)
    assert all(r >= 1 for client in MIXED for r in state.aux[f"rank/{client.id}"].tolist())


def test_the_local_term_travels_in_the_payload():
    assert HETLORA.downlink(first_state(HETLORA), SMALL).penalty == Penalty("tail", 0.1, 0.5)
    plain = make("hetlora", prune=False)
    assert plain.downlink(first_state(plain), SMALL).penalty is None
    assert (HETLORA.prunes, plain.prunes) == (True, False)


@pytest.mark.parametrize("settings", [{"gamma": 0.0}, {"gamma": 1.0}, {"penalty": -1.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="hetlora"):
        make("hetlora", **settings)
