"""FedSA-LoRA: share A, keep B at the client.

Guo, Zeng, Wang, Fan, Wang, Qu: Selective Aggregation for Low-Rank Adaptation in Federated Learning,
ICLR 2025, arXiv 2410.01463.

    A_j = sum_{k: r_k >= j} p_k A_kj / q_j        every client trains both and keeps its own B

A is taken to carry what clients have in common, B what is their own. Clients keep state between
rounds, so it needs cross-silo: a client that is sampled once never meets its B again. The model of
a client that was never sampled is the base model, since B starts at zero.
"""

from __future__ import annotations

from dataclasses import replace

from flexlora.federation.state import Client, Method, Payload, ServerState, Updates, iterate
from flexlora.lowrank import LowRank, index_mean, stack
from flexlora.methods.downlink import advance, pack, restarted, view_of


def fedsa_lora() -> Method:
    """FedSA-LoRA: mean of A over owners, B private.

    >>> fedsa_lora().stateless
    False
    """
    return Method(
        name="fedsa-lora",
        downlink=downlink,
        aggregate=aggregate,
        view=view_of(downlink),
        mixed_ranks=True,
        linear=True,
        averages="factors",
        stateless=False,
        trains="A, B; B stays at the client",
        up="r d_in",
        down="r d_in",
        citation="Guo et al.: Selective Aggregation for Low-Rank Adaptation in Federated Learning, "
        "ICLR 2025, arXiv 2410.01463",
        start=restarted,
    )


def downlink(state: ServerState, client: Client) -> Payload:
    """A; B is the client's own, or zero the first time."""
    return replace(pack(state, client), keep="B", known="B")


def aggregate(state: ServerState, updates: Updates) -> ServerState:
    """The owners' mean of A; the server's B stays zero."""
    G = {}
    for module, terms in iterate(updates):
        g = state.G[module]
        mean = index_mean(terms, updates.weights, pad="owner")
        G[module] = LowRank(g.B, stack([mean, g.suffix(mean.rank)]).A)
    return advance(state, G)
