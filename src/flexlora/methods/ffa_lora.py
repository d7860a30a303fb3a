"""FFA-LoRA: one random A, frozen and common; only B is trained and averaged.

Sun, Li, Li, Ding: Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024,
arXiv 2403.12313.

    B = sum_k p_k s_k pad(B_k)        A as drawn at the start

With A common, the mean of B is the mean of the products: exact, and at mixed ranks too (a client at
rank r uses the first r rows). Half the trainable numbers, less than half the freedom.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from flexlora.federation.state import Client, Method, Payload, ServerState, Updates, iterate
from flexlora.lowrank import LowRank, index_mean
from flexlora.methods.downlink import advance, pack, restarted, view_of


def ffa_lora() -> Method:
    """FFA-LoRA: B only, against a frozen random A.

    >>> ffa_lora().trains
    'B'
    """
    return Method(
        name="ffa-lora",
        downlink=downlink,
        aggregate=aggregate,
        view=view_of(downlink),
        mixed_ranks=True,
        exact=True,
        linear=True,
        averages="factors",
        trains="B",
        up="r d_out",
        down="r d_out",
        citation="Sun et al.: Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024, "
        "arXiv 2403.12313",
        start=restarted,
    )


def downlink(state: ServerState, client: Client) -> Payload:
    """B; the client draws A from the run's seed."""
    return replace(pack(state, client), train="B", known="A")


def aggregate(state: ServerState, updates: Updates) -> ServerState:
    """The mean of B beside the old A."""
    return advance(
        state, {m: with_mean_B(state.G[m], terms, updates.weights) for m, terms in iterate(updates)}
    )


def with_mean_B(g: LowRank, terms: list[LowRank], weights: tuple[float, ...]) -> LowRank:
    """`g` with B replaced by the clients' zero-padded mean; A stays, bit for bit."""
    B = index_mean(terms, weights).B
    return LowRank(torch.nn.functional.pad(B, (0, g.rank - B.shape[1])), g.A)
