"""What clients keep between rounds, held for them by the engine (`Payload.keep`).

Two generations per client: a run that is taken up from a checkpoint of an earlier round finds what
the client had then, not what it trained after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from flexlora.federation.state import Payload, Update
from flexlora.lowrank import LowRank

Kept = dict[str, dict[int, dict[str, Tensor]]]
"""Client -> round -> `module.factor` -> tensor."""


def recall(kept: Kept, payload: Payload) -> Payload:
    """The payload with the factors that the client kept from its last round before this one."""
    earlier = [r for r in kept.get(payload.client, {}) if r < payload.round]
    if not payload.keep or not earlier:
        return payload
    own = kept[payload.client][max(earlier)]
    adapter = {
        m: LowRank(
            _at_rank(own.get(f"{m}.B"), d.B, 1), _at_rank(own.get(f"{m}.A"), d.A, 0), d.scaling
        )
        for m, d in payload.adapter.items()
    }
    return replace(payload, adapter=adapter)


def _at_rank(own: Tensor | None, sent: Tensor, dim: int) -> Tensor:
    """A kept factor at the rank that was sent: its head, or with the rest of what was sent."""
    if own is None or own.shape == sent.shape:
        return sent if own is None else own
    rank, had = sent.shape[dim], own.shape[dim]
    rest = sent.narrow(dim, min(had, rank), max(rank - had, 0))
    return torch.cat([own.narrow(dim, 0, min(had, rank)), rest], dim)


def remember(kept: Kept, payload: Payload, update: Update) -> Update:
    """Keep what stays at the client; the update without it, the payload's in its place."""
    if not payload.keep:
        return update
    trained = update.adapter
    own = {f"{m}.{f}": getattr(d, f) for m, d in trained.items() for f in payload.keep}
    rounds = {r: t for r, t in kept.get(payload.client, {}).items() if r < payload.round}
    last = max(rounds, default=0)
    kept[payload.client] = {r: t for r, t in rounds.items() if r == last} | {payload.round: own}
    adapter = dict(trained)
    for m, sent in payload.adapter.items():
        B = sent.B if "B" in payload.keep else trained[m].B
        A = sent.A if "A" in payload.keep else trained[m].A
        adapter[m] = LowRank(B, A, trained[m].scaling)
    return replace(update, adapter=adapter)


def flat(kept: Kept) -> dict[str, Tensor]:
    """As named tensors, for a file: `round|module.factor|client`."""
    return {
        f"{r}|{name}|{client}": tensor
        for client, rounds in kept.items()
        for r, tensors in rounds.items()
        for name, tensor in tensors.items()
    }


def nested(tensors: Mapping[str, Tensor]) -> Kept:
    """Inverse of :func:`flat`."""
    kept: Kept = {}
    for key, tensor in tensors.items():
        r, name, client = key.split("|", 2)
        kept.setdefault(client, {}).setdefault(int(r), {})[name] = tensor
    return kept
