"""FedAvg on LoRA factors: average A, average B, everyone at one rank.

McMahan et al.: Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS
2017, arXiv 1602.05629, applied to LoRA factors with local SGD; with local AdamW it is FedIT,
Zhang et al.: Towards Building the Federated GPT, ICASSP 2024, arXiv 2305.05644.

    B = sum_k p_k s_k B_k / s        A = sum_k p_k A_k

The product of the means is not the mean of the products: `sum p_k B_k A_k - B A` is
`1/2 sum_ij p_i p_j (B_i - B_j)(A_i - A_j)`. Equal ranks are required, so everyone trains at the
rank of the weakest client.
"""

from __future__ import annotations

from dataclasses import replace

from flexlora.federation.state import Method, ServerState, Updates, iterate
from flexlora.lowrank import LowRank, index_mean
from flexlora.methods.downlink import advance, pack, view_of


def fedavg() -> Method:
    """FedAvg-LoRA: means of the factors, local SGD unless the training settings say otherwise."""
    return Method(
        name="fedavg",
        downlink=pack,
        aggregate=aggregate,
        view=view_of(pack),
        mixed_ranks=False,
        linear=True,
        averages="factors",
        optimizer="sgd",
        citation="McMahan et al.: Communication-Efficient Learning of Deep Networks from "
        "Decentralized Data, AISTATS 2017, arXiv 1602.05629",
    )


def fedit() -> Method:
    """FedIT: the same server rule with local AdamW.

    >>> fedit().optimizer, fedit().mixed_ranks
    ('adamw', False)
    """
    return replace(
        fedavg(),
        name="fedit",
        optimizer="adamw",
        citation="Zhang et al.: Towards Building the Federated GPT: Federated Instruction Tuning, "
        "ICASSP 2024, arXiv 2305.05644",
    )


def aggregate(state: ServerState, updates: Updates) -> ServerState:
    """Weighted means of A and of the scaled B.

    Raises:
        ValueError: clients of unequal rank.
    """
    return advance(state, {m: mean(m, terms, updates.weights) for m, terms in iterate(updates)})


def mean(module: str, terms: list[LowRank], weights: tuple[float, ...]) -> LowRank:
    """The mean factors of one module, of clients that must hold one rank."""
    ranks = sorted({d.rank for d in terms})
    if len(ranks) > 1:
        raise ValueError(
            f"module {module!r}: the factors of ranks {ranks} have no common mean. Give every "
            "client one rank, or use a method for mixed ranks such as flexlora."
        )
    return index_mean(terms, weights)
