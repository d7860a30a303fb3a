"""What clients keep between rounds."""

from __future__ import annotations

import torch

from flexlora.federation.state import Payload, Update
from flexlora.lowrank import LowRank
from flexlora.training.kept import Kept, flat, nested, recall, remember


def sent(round: int) -> Payload:
    adapter = {"q": LowRank(torch.zeros(3, 2), torch.full((2, 4), float(round)), 0.5)}
    return Payload("a/b|c", round, "base", adapter, keep="B")


def trained(payload: Payload, value: float) -> Update:
    adapter = {"q": LowRank(torch.full((3, 2), value), torch.full((2, 4), value), 0.5)}
    return Update(payload.client, payload.round, "base", adapter, 5)


def test_a_client_goes_on_from_its_own_factor_and_does_not_send_it() -> None:
    kept: Kept = {}
    first = recall(kept, sent(1))
    assert first.adapter["q"].B.sum() == 0
    update = remember(kept, sent(1), trained(first, 7.0))
    assert update.adapter["q"].B.sum() == 0
    assert update.adapter["q"].A.mean() == 7
    second = recall(kept, sent(2))
    assert second.adapter["q"].B.mean() == 7
    assert second.adapter["q"].A.mean() == 2


def test_two_generations_survive_a_file_and_a_round_done_again() -> None:
    kept: Kept = {}
    for round in (1, 2, 3):
        remember(kept, sent(round), trained(sent(round), float(round)))
    kept = nested(flat(kept))
    assert set(kept["a/b|c"]) == {2, 3}
    assert recall(kept, sent(3)).adapter["q"].B.mean() == 2
    assert recall(kept, sent(4)).adapter["q"].B.mean() == 3
    remember(kept, sent(3), trained(sent(3), 9.0))
    assert recall(kept, sent(4)).adapter["q"].B.mean() == 9


def test_a_method_that_keeps_nothing_passes_through() -> None:
    kept: Kept = {}
    payload = Payload("a", 1, "base", sent(1).adapter)
    update = trained(payload, 1.0)
    assert remember(kept, payload, update) is update
    assert recall(kept, payload) is payload
    assert not kept


def test_a_kept_factor_follows_the_rank_that_is_sent() -> None:
    """A client may have another rank next round: the head of what it kept, or zeros behind it."""
    kept: Kept = {}
    remember(kept, sent(1), trained(sent(1), 7.0))
    for rank in (1, 2, 5):
        adapter = {"q": LowRank(torch.zeros(3, rank), torch.ones(rank, 4), 0.5)}
        B = recall(kept, Payload("a/b|c", 2, "base", adapter, keep="B")).adapter["q"].B
        assert B.shape == (3, rank)
        assert B.sum() == 7 * 3 * min(rank, 2)
