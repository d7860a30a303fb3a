"""RoLoRA: train and average B in odd rounds, A in even ones.

Chen, Guo, Ju, Dalal, Zhu, Khisti: Robust Federated Finetuning of LLMs via Alternating Optimization
of LoRA, arXiv 2502.01755.

    odd round:   B = sum_k p_k s_k pad(B_k), A stays
    even round:  A = sum_k p_k pad(A_k),     B stays

One factor is common to all clients in every round, so the mean of the other is the mean of the
products. Round 1 trains B: against B = 0, A has no gradient.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from flexlora.federation.state import Client, Method, Payload, ServerState, Updates, iterate
from flexlora.lowrank import LowRank, index_mean
from flexlora.methods.downlink import advance, pack, view_of
from flexlora.methods.ffa_lora import with_mean_B


def rolora() -> Method:
    """RoLoRA: one factor a round.

    >>> rolora().trains
    'B in odd rounds, A in even'
    """
    return Method(
        name="rolora",
        downlink=downlink,
        aggregate=aggregate,
        view=view_of(downlink),
        mixed_ranks=True,
        exact=True,
        linear=True,
        averages="factors",
        trains="B in odd rounds, A in even",
        up="r d_out or r d_in",
        down="r (d_out + d_in)",
        citation="Chen et al.: Robust Federated Finetuning of LLMs via Alternating Optimization of "
        "LoRA, arXiv 2502.01755",
    )


def downlink(state: ServerState, client: Client) -> Payload:
    """Both factors (a client that missed a round lacks either), one of them to be trained."""
    return replace(pack(state, client), train="B" if state.round % 2 == 0 else "A")


def aggregate(state: ServerState, updates: Updates) -> ServerState:
    """The mean of the factor that this round trained."""
    replaced = with_mean_B if state.round % 2 == 0 else _with_mean_A
    return advance(
        state, {m: replaced(state.G[m], terms, updates.weights) for m, terms in iterate(updates)}
    )


def _with_mean_A(g: LowRank, terms: list[LowRank], weights: tuple[float, ...]) -> LowRank:
    A = index_mean(terms, weights).A
    return LowRank(g.B, torch.nn.functional.pad(A, (0, 0, 0, g.rank - A.shape[0])))
