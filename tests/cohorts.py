"""A federation in miniature: two unequal clients, non-square modules, alpha / r not 1, float64."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from flexlora.adapter import LoraSpec, initial_adapter
from flexlora.federation.spool import Spool
from flexlora.federation.state import Client, Method, Payload, ServerState, Update
from flexlora.lowrank import LowRank

SHAPES = {"q": (5, 7), "up": (9, 4)}
R = {"q": 4, "up": 3}
"""The server's rank per module."""

SMALL = Client("small", LoraSpec({"q": 2, "up": 1}, lora_alpha=6), num_examples=3)
LARGE = Client("large", LoraSpec({"q": 4, "up": 3}, lora_alpha=5, alpha_rule="rslora"), 8)
MIXED = (SMALL, LARGE)
EQUAL = (replace(SMALL, lora=LARGE.lora), replace(LARGE, lora=replace(LARGE.lora, lora_alpha=3)))
"""Equal ranks, unequal scalings."""

Train = Callable[[Payload], Mapping[str, LowRank]]


def clients_for(method: Method) -> tuple[Client, ...]:
    """The two clients of unequal rank where the method allows it."""
    return MIXED if method.mixed_ranks else EQUAL


def first_state(method: Method, seed: int = 0) -> ServerState:
    """The state before round 1."""
    G = {m: d.to(torch.float64) for m, d in initial_adapter(SHAPES, R, seed).items()}
    return method.start(ServerState(0, "base", G, seed=seed))


def noise(payload: Payload) -> dict[str, LowRank]:
    """Training stood in for by noise on what the payload says is trained; seeded by receiver."""
    generator = torch.Generator().manual_seed(sum(map(ord, payload.client)) + payload.round)

    def moved(x: torch.Tensor, factor: str) -> torch.Tensor:
        change = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x + 0.5 * change if factor in payload.train else x

    return {
        m: LowRank(moved(d.B, "B"), moved(d.A, "A"), d.scaling) for m, d in payload.adapter.items()
    }


def nothing(payload: Payload) -> Mapping[str, LowRank]:
    """Zero steps: what came is sent back."""
    return payload.adapter


def collect(
    method: Method, state: ServerState, clients: Sequence[Client], train: Train = noise
) -> Spool:
    """Downlink and training of one round, and its updates."""
    updates = Spool(1 << 30, Path(tempfile.gettempdir()))
    for client in clients:
        payload = method.downlink(state, client)
        adapter = train(payload)
        updates.add(Update(client.id, payload.round, payload.base, adapter, client.num_examples))
    return updates


def play(
    method: Method,
    rounds: int,
    clients: Sequence[Client] | None = None,
    train: Train = noise,
    state: ServerState | None = None,
) -> ServerState:
    """Several rounds with everyone."""
    state = first_state(method) if state is None else state
    clients = clients_for(method) if clients is None else clients
    for _ in range(rounds):
        state = method.aggregate(state, collect(method, state, clients, train))
    return state


def effective(
    state: ServerState, method: Method, client: Client | None = None
) -> dict[str, torch.Tensor]:
    """Dense change of every weight: patch + view."""
    view = method.view(state, client)
    return {m: dense(d) + dense(state.patch.get(m)) for m, d in view.items()}


def dense(term: LowRank | torch.Tensor | None) -> torch.Tensor:
    """A term as a matrix; absent is zero."""
    if term is None:
        return torch.zeros((), dtype=torch.float64)
    return term.dense() if isinstance(term, LowRank) else term


def trunc(D: torch.Tensor, rank: int) -> torch.Tensor:
    """The best rank-`rank` approximation, dense."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]
