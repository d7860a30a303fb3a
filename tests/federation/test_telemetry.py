"""Telemetry against dense matrices."""

import json
from dataclasses import replace

import pytest
import torch
from federation.quadratic import SHAPES, Quadratic, people, start

from flexlora.adapter import LoraSpec
from flexlora.federation.ranks import PAPER_TYPES
from flexlora.federation.spool import Spool
from flexlora.federation.state import Client, Payload, ServerState
from flexlora.federation.telemetry import (
    cosines,
    download_bytes,
    levels,
    retention,
    singular_values,
    spectra,
    upload_bytes,
)
from flexlora.lowrank import LowRank
from flexlora.methods import make

CLIENTS = people([3, 5, 5, 9])
METHOD = make("flexlora")


@pytest.fixture
def rounds(tmp_path):
    """Two rounds of FlexLoRA: states, payloads and updates of the second."""
    state = start(CLIENTS)
    for _ in range(2):
        before, spool = state, Spool(10**9, tmp_path)
        sent = {c.id: METHOD.downlink(before, c) for c in CLIENTS}
        for update in Quadratic().train(list(sent.values()), {c.id: c for c in CLIENTS}):
            detached = {
                m: LowRank(d.B.detach(), d.A.detach(), d.scaling) for m, d in update.adapter.items()
            }
            spool.add(replace(update, adapter=detached))
        state = METHOD.aggregate(before, spool)
    return before, state, sent, spool


def dense(state, module):
    patch = state.patch.get(module, 0)
    return (patch.dense() if isinstance(patch, LowRank) else patch) + state.G[module].dense()


def test_singular_values_are_the_dense_ones():
    g = torch.Generator().manual_seed(0)
    d = LowRank(torch.randn(9, 4, generator=g), torch.randn(4, 7, generator=g), -1.7)
    assert torch.allclose(singular_values(d), torch.linalg.svdvals(d.dense())[:4], atol=1e-5)


def test_spectra_are_the_dense_ones(rounds):
    _, state, *_ = rounds
    found = spectra(state, levels(CLIENTS), per_module=True)
    S2 = {m: torch.linalg.svdvals(d.dense().double()) ** 2 for m, d in state.G.items()}
    total = sum(float(e.sum()) for e in S2.values())
    assert found["energy"] == pytest.approx(total, rel=1e-5)
    for r in (3, 5, 9):
        kept = sum(float(e[:r].sum()) for e in S2.values()) / total
        assert found["captured"][str(r)] == pytest.approx(kept, rel=1e-5)
    assert found["beyond_smallest"] == pytest.approx(1 - found["captured"]["3"])
    for module, e in S2.items():
        p = e[e > 1e-12] / e.sum()
        effective = float(torch.exp(-(p * p.log()).sum()))
        assert found["modules"][module]["effective_rank"] == pytest.approx(effective, rel=1e-4)
    assert "modules" not in spectra(state, levels(CLIENTS))
    json.dumps(found)


def test_a_zero_adapter_has_no_shares():
    found = spectra(start(CLIENTS), levels(CLIENTS))
    assert found["captured"] == {"3": None, "5": None, "9": None}
    assert (found["energy"], found["beyond_smallest"], found["effective_rank"]) == (0, None, 0)


def test_levels_of_types_that_depend_on_the_module():
    mixed = [Client(str(i), LoraSpec(r), 1) for i, r in enumerate(reversed(PAPER_TYPES))]
    assert list(levels(mixed)) == ["8", "30", "30/200", "200"]


def test_retention_is_what_a_round_without_training_leaves(rounds, tmp_path):
    _, state, *_ = rounds
    spool = Spool(0, tmp_path)
    for update in Quadratic(learning_rate=0.0).train(
        [METHOD.downlink(state, c) for c in CLIENTS], {c.id: c for c in CLIENTS}
    ):
        still = {
            m: LowRank(d.B.detach(), d.A.detach(), d.scaling) for m, d in update.adapter.items()
        }
        spool.add(replace(update, adapter=still))
    q = retention(spool)
    assert q == {"3": pytest.approx(1.0), "5": pytest.approx(0.9), "9": pytest.approx(0.4)}
    after = METHOD.aggregate(state, spool)
    for module, g in state.G.items():
        factor = torch.tensor([q["3"]] * 3 + [q["5"]] * 2 + [q["9"]] * 4)
        expected = LowRank(g.B * factor, g.A).dense()
        assert torch.allclose(after.G[module].dense(), expected, atol=1e-5)


@pytest.mark.parametrize("patch", [None, "low", "dense"])
def test_cosines_are_the_dense_ones(rounds, patch):
    before, after, sent, spool = rounds
    if patch:
        g = torch.Generator().manual_seed(1)
        low = {
            m: LowRank(torch.randn(o, 2, generator=g), torch.randn(2, i, generator=g), 0.3)
            for m, (o, i) in SHAPES.items()
        }
        after = replace(
            after, patch=low if patch == "low" else {m: d.dense() for m, d in low.items()}
        )
    found = cosines(before, after, spool, sent)
    step = torch.cat([(dense(after, m) - dense(before, m)).flatten() for m in SHAPES])
    for i, client in enumerate(spool.clients):
        change = torch.cat(
            [
                (spool.module(m)[i].dense() - sent[client].adapter[m].dense()).flatten()
                for m in SHAPES
            ]
        )
        expected = torch.nn.functional.cosine_similarity(change, step, dim=0).item()
        assert found[client] == pytest.approx(expected, abs=1e-4)


def test_nothing_moved_has_no_direction(rounds):
    before, _, sent, spool = rounds
    assert set(cosines(before, before, spool, sent).values()) == {None}


def test_bytes_are_those_of_the_tensors():
    adapter = {"q": LowRank(torch.zeros(3, 2), torch.zeros(2, 5))}
    payload = Payload("a", 1, "base", adapter, frozen={"q": (adapter["q"], torch.zeros(3, 5))})
    assert download_bytes(payload) == 4 * (6 + 10 + 16 + 15)
    assert download_bytes(replace(payload, known="A"), "bfloat16") == 2 * (6 + 16 + 15)
    assert upload_bytes(payload, adapter) == 4 * 16
    assert upload_bytes(replace(payload, keep="B"), adapter) == 4 * 10
    assert upload_bytes(replace(payload, train="B"), adapter) == 4 * 6


def test_a_state_without_modules_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="no modules"):
        spectra(ServerState(0, "base", {}), levels(CLIENTS))
