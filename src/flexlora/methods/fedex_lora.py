"""FedEx-LoRA: mean factors, and the error of that mean merged into the base.

Singhal, Ponkshe, Vepakomma: FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning
of Large Language Models, ACL 2025, arXiv 2410.09432.

    B = sum_k p_k s_k B_k     A = sum_k p_k A_k
    patch <- patch + sum_k p_k s_k B_k A_k - B A

Exact, at one rank for everyone. The patch is kept as stacked factors while that is smaller than the
matrix: what a client that keeps nothing between rounds must be sent.
"""

from __future__ import annotations

from dataclasses import replace

from flexlora.federation.state import Method, ServerState, Updates, iterate
from flexlora.lowrank import merge, stack
from flexlora.methods.downlink import pack, view_of
from flexlora.methods.fedavg import mean


def fedex_lora() -> Method:
    """FedEx-LoRA: FedAvg on the factors, its residual in the patch.

    >>> fedex_lora().exact, fedex_lora().mixed_ranks
    (True, False)
    """
    return Method(
        name="fedex-lora",
        downlink=pack,
        aggregate=aggregate,
        view=view_of(pack),
        mixed_ranks=False,
        exact=True,
        linear=True,
        averages="patch",
        down="r (d_out + d_in) + min(rounds (clients + 1) r (d_out + d_in), d_out d_in)",
        citation="Singhal et al.: FedEx-LoRA: Exact Aggregation for Federated and Efficient "
        "Fine-Tuning of Large Language Models, ACL 2025, arXiv 2410.09432",
    )


def aggregate(state: ServerState, updates: Updates) -> ServerState:
    """Mean factors, residual into the patch.

    Raises:
        ValueError: clients of unequal rank.
    """
    G, patch, p = {}, dict(state.patch), updates.weights
    for module, terms in iterate(updates):
        G[module] = mean(module, terms, p)
        residual = stack([*terms, G[module]], [*p, -1.0])
        patch[module] = merge(patch.get(module), residual)
    return replace(state, round=state.round + 1, G=G, patch=patch)
