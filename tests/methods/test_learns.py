"""Every method learns: a tiny linear regression, trained as the payload says and no other way.

`fit` below is the smallest engine there can be: it knows payloads, and no method by name.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cohorts import EQUAL, MIXED, SHAPES, dense, first_state

from flexlora.federation.spool import Spool
from flexlora.federation.state import Update
from flexlora.lowrank import LowRank
from flexlora.methods import make, methods
from flexlora.training.penalties import value

STEPS, RATE, ROUNDS = 15, 0.03, 8
SETTINGS = {"slora": {"rounds": 2, "density": 0.5}, "fedadam": {"lr": 0.1}}
LEFT = {"ffa-lora": 0.9}
"""Share of the loss that may be left; FFA sees a random subspace of 1 or 2 dimensions here."""


def target(client):
    """What a client would learn: a change common to all, and a little of its own."""
    random = torch.Generator().manual_seed(7)
    own = torch.Generator().manual_seed(client.num_examples)
    change = {}
    for m, (o, i) in SHAPES.items():
        common = torch.randn(o, 2, generator=random) @ torch.randn(2, i, generator=random)
        change[m] = (common + 0.2 * torch.randn(o, i, generator=own)).double()
    return change


def change_of(payload, factors):
    """Module -> the change of its weight: what is trained and what is frozen."""
    change = {}
    for m, (B, A) in factors.items():
        d = payload.adapter[m]
        moved = payload.mask[m].dense(B[:, 0]) if m in payload.mask else d.scaling * (B @ A)
        change[m] = moved + sum(dense(t) for t in payload.frozen.get(m, ()))
    return change


def loss_of(change, client):
    wanted = target(client)
    return sum(((change[m] - wanted[m]) ** 2).mean() for m in SHAPES)


def penalty_of(payload, factors):
    if payload.penalty is None:
        return 0.0
    total = 0.0
    for m, (B, A) in factors.items():
        d = payload.adapter[m]
        rest = torch.tensor([d.scaling]), torch.tensor([d.rank])
        total += value(payload.penalty, (B[None], A[None]), (d.B[None], d.A[None]), *rest)[0]
    return total


def fit(payload, client, optimizer):
    """A client's local round; returns its adapter."""
    factors = {m: (d.B.clone(), d.A.clone()) for m, d in payload.adapter.items()}
    moving = [f[0] for f in factors.values() if "B" in payload.train]
    moving += [f[1] for f in factors.values() if "A" in payload.train]
    for t in moving:
        t.requires_grad_()
    if optimizer == "sgd":
        steps = torch.optim.SGD(moving, lr=RATE)
    else:
        steps = torch.optim.AdamW(moving, lr=RATE, weight_decay=0)
    for _ in range(STEPS):
        steps.zero_grad()
        loss = loss_of(change_of(payload, factors), client) + penalty_of(payload, factors)
        loss.backward()
        steps.step()
    return {
        m: LowRank(B.detach(), A.detach(), payload.adapter[m].scaling)
        for m, (B, A) in factors.items()
    }


@pytest.mark.parametrize("name", sorted(methods))
def test_loss_falls(name):
    method = make(name, **SETTINGS.get(name, {}))
    clients = MIXED if method.mixed_ranks else EQUAL
    state, kept = first_state(method), {}

    def start_of(client):
        """The payload, with the factors that the client keeps put in: an engine's memory."""
        payload = method.downlink(state, client)
        own = kept.get(client.id, payload.adapter)
        adapter = {
            m: LowRank(own[m].B if "B" in payload.keep else d.B, d.A, d.scaling)
            for m, d in payload.adapter.items()
        }
        return replace(payload, adapter=adapter)

    def losses():
        found = []
        for client in clients:
            payload = start_of(client)
            factors = {m: (d.B, d.A) for m, d in payload.adapter.items()}
            found.append(float(loss_of(change_of(payload, factors), client)))
        return found

    before = losses()
    for _ in range(ROUNDS):
        updates = Spool(1 << 30, Path(tempfile.gettempdir()))
        for client in clients:
            payload = start_of(client)
            kept[client.id] = fit(payload, client, method.optimizer)
            sent = method.downlink(state, client).adapter
            answer = {
                m: LowRank(sent[m].B if "B" in payload.keep else d.B, d.A, d.scaling)
                for m, d in kept[client.id].items()
            }
            updates.add(Update(client.id, payload.round, "base", answer, client.num_examples))
        state = method.aggregate(state, updates)
    after = losses()
    assert all(b < LEFT.get(name, 0.7) * a for a, b in zip(before, after, strict=True))
