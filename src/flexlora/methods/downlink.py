"""What server rules share: how a client's payload is cut out of the global adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from flexlora.adapter import Adapter, LoraSpec, initial_adapter, stable_seed
from flexlora.federation.state import Client, Payload, ServerState, Wire
from flexlora.lowrank import LowRank, Split, hand_out, merge

T = TypeVar("T", bound=LowRank | Tensor)


def head(G: Adapter, lora: LoraSpec, split: Split = "B") -> dict[str, LowRank]:
    """The first `r` components of every module at a client's own rank and scaling.

    With `G` in SVD form this is `trunc_r(G)`; with averaged factors it is their prefix.

    Raises:
        ValueError: a rank above what `G` holds; names the module.
    """
    adapter = {}
    for module, g in G.items():
        rank = lora.rank(module)
        if rank > g.rank:
            raise ValueError(
                f"rank {rank} at module {module!r}: the server holds {g.rank} components; raise "
                "its rank or lower the client's."
            )
        adapter[module] = hand_out(g, rank, lora.scaling(module), split)
    return adapter


def pack(
    state: ServerState, client: Client, adapter: Adapter | None = None, split: Split = "B"
) -> Payload:
    """A payload for the next round: the adapter (`head` by default) as the wire rounds it.

    The patch travels as a frozen term. Methods `dataclasses.replace` what else differs.
    """
    adapter = head(state.G, client.lora, split) if adapter is None else adapter
    return Payload(
        client=client.id,
        round=state.round + 1,
        base=state.base,
        adapter={m: rounded(d, state.wire) for m, d in adapter.items()},
        frozen={m: (rounded(term, state.wire),) for m, term in state.patch.items()},
        seed=state.seed,
    )


def rounded(term: T, wire: Wire) -> T:
    """What a receiver decodes: numbers rounded to the wire's precision, in their own dtype.

    Rounding here, once, makes every wire lossless and lets a method subtract what was really got.
    """
    if wire == "float32":
        return term
    dtype = term.dtype if isinstance(term, Tensor) else term.B.dtype
    return cast(T, term.to(dtype=getattr(torch, wire)).to(dtype=dtype))


def sent_to(state: ServerState, module: str, d: LowRank, split: Split = "B") -> LowRank:
    """What the client that returned `d` started from: the head at its rank, as it was decoded."""
    return rounded(hand_out(state.G[module], d.rank, d.scaling, split), state.wire)


def view_of(
    downlink: Callable[[ServerState, Client], Payload],
) -> Callable[[ServerState, Client | None], Adapter]:
    """The usual view: all of `G`, or what a client would be handed."""

    def view(state: ServerState, client: Client | None) -> Adapter:
        return state.G if client is None else downlink(state, client).adapter

    return view


def advance(state: ServerState, G: Adapter) -> ServerState:
    """The state after a round that only replaced `G`."""
    return replace(state, round=state.round + 1, G=G)


def restarted(state: ServerState) -> ServerState:
    """A start for methods whose clients know the initial factors: a warm start becomes patch.

    `G` becomes what `initial_adapter` draws from the state's seed, with `B = 0`.
    """
    warm = {m: d for m, d in state.G.items() if d.B.any()}
    patch = {**state.patch, **{m: merge(state.patch.get(m), d) for m, d in warm.items()}}
    return replace(state, G=drawn(state.G, state.seed), patch=patch)


def drawn(G: Adapter, seed: int) -> dict[str, LowRank]:
    """Initial factors with the shapes, ranks, dtypes and devices of `G`."""
    shapes, ranks = {m: d.shape for m, d in G.items()}, {m: d.rank for m, d in G.items()}
    fresh = initial_adapter(shapes, ranks, seed)
    return {m: d.to(G[m].B.dtype, G[m].B.device) for m, d in fresh.items()}


def draw_seed(state: ServerState, purpose: str, module: str) -> int:
    """A seed for what the coming aggregate draws at one module."""
    return stable_seed(state.seed, purpose, state.round + 1, module)
