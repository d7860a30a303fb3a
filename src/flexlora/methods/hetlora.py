"""HetLoRA: prefixes of one pair of factors, norm-weighted zero-padded means, ranks that shrink.

Cho, Liu, Xu, Fahrezi, Joshi: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
Models, EMNLP 2024, arXiv 2401.06432.

    client:  loss + penalty ||B[:, t:]|| ||A[t:]||      with t = floor(gamma r)
             r <- t  where that tail norm fell below the one it received
    server:  w_k = ||D_k||_F / sum_j ||D_j||_F
             B = sum_k w_k s_k pad(B_k)      A = sum_k w_k pad(A_k)

The tail test needs only what was sent and what came back, so it runs on the server and clients stay
stateless; the shrunken ranks are in the state. We differ from the paper in one point: components
that no client of the cohort holds stay as they are (zeros in both factors could never train again).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from flexlora.adapter import LoraSpec
from flexlora.federation.state import Client, Method, Payload, Penalty, ServerState, Updates
from flexlora.lowrank import LowRank, index_mean, norm_weights, stack
from flexlora.methods.downlink import head, pack, sent_to, view_of


def hetlora(gamma: float = 0.99, penalty: float = 5e-3, prune: bool = True) -> Method:
    """HetLoRA.

    Args:
        gamma: share of a client's rank that survives one pruning; in (0, 1).
        penalty: coefficient of the tail norm in the local loss; 0 leaves it out.
        prune: whether ranks shrink.

    Raises:
        ValueError: `gamma` outside (0, 1), or a negative `penalty`.
    """
    if not 0 < gamma < 1:
        raise ValueError(f"hetlora: gamma is {gamma}; expected a share between 0 and 1.")
    if penalty < 0:
        raise ValueError(f"hetlora: penalty is {penalty}; expected 0 or more.")
    term = Penalty("tail", penalty, gamma) if prune and penalty else None

    def downlink(state: ServerState, client: Client) -> Payload:
        adapter = head(state.G, current_lora(state, client))
        return replace(pack(state, client, adapter), penalty=term)

    def aggregate(state: ServerState, updates: Updates) -> ServerState:
        G: dict[str, LowRank] = {}
        ranks: dict[str, list[int]] = {client: [] for client in updates.clients}
        for module, g in state.G.items():
            terms = updates.module(module)
            if prune:
                terms = [_pruned(d, sent_to(state, module, d), gamma) for d in terms]
            for client, d in zip(updates.clients, terms, strict=True):
                ranks[client].append(d.rank)
            mean = index_mean(terms, norm_weights(terms))
            G[module] = stack([mean, g.suffix(mean.rank)])
        aux = {f"rank/{client}": torch.tensor(r) for client, r in ranks.items()}
        return replace(state, round=state.round + 1, G=G, aux={**state.aux, **aux})

    return Method(
        name="hetlora",
        downlink=downlink,
        aggregate=aggregate,
        view=view_of(downlink),
        mixed_ranks=True,
        prunes=prune,
        averages="factors",
        citation="Cho et al.: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation "
        "Models, EMNLP 2024, arXiv 2401.06432",
    )


def current_lora(state: ServerState, client: Client) -> LoraSpec:
    """What a client trains now: its spec at the ranks that pruning has left it."""
    kept = state.aux.get(f"rank/{client.id}")
    if kept is None:
        return client.lora
    pairs = zip(state.G, kept.tolist(), strict=True)
    return replace(client.lora, r={m: min(r, client.lora.rank(m)) for m, r in pairs})


def _pruned(d: LowRank, sent: LowRank, gamma: float) -> LowRank:
    """The update without its tail if that got smaller than the one that was sent."""
    tail = max(1, math.floor(gamma * d.rank))
    return d.prefix(tail) if tail_norm(d, tail) < tail_norm(sent, tail) else d


def tail_norm(d: LowRank, tail: int) -> float:
    """`||B[:, tail:]||_F ||A[tail:]||_F` of the factors as they are."""
    return float(d.B[:, tail:].norm() * d.A[tail:].norm())
