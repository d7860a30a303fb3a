"""RBLA: every component is averaged over the clients that hold it.

Chen, Tavallaie, Nazemi, Zomaya: RBLA: Rank-Based-LoRA-Aggregation for Fine-tuning Heterogeneous
Models in FLaaS, ICWS 2024, arXiv 2408.08699.

    B_j = sum_{k: r_k >= j} p_k s_k B_kj / q_j      A_j = sum_{k: r_k >= j} p_k A_kj / q_j
    q_j = sum of p_k over clients with r_k >= j

Small clients do not dilute the components they lack, as zero padding would. Components that nobody
in the cohort holds stay as they are. The mean is taken of the changes to what was sent: the same,
and an untrained component stays as it is at any precision of the wire.
"""

from __future__ import annotations

from flexlora.federation.state import Method, ServerState, Updates, iterate
from flexlora.lowrank import LowRank, index_mean
from flexlora.methods.downlink import advance, pack, sent_to, view_of


def rbla() -> Method:
    """RBLA: owners' means of the factors.

    >>> rbla().mixed_ranks
    True
    """
    return Method(
        name="rbla",
        downlink=pack,
        aggregate=aggregate,
        view=view_of(pack),
        mixed_ranks=True,
        linear=True,
        averages="factors",
        citation="Chen et al.: RBLA: Rank-Based-LoRA-Aggregation for Fine-tuning Heterogeneous "
        "Models in FLaaS, ICWS 2024, arXiv 2408.08699",
    )


def aggregate(state: ServerState, updates: Updates) -> ServerState:
    """The owners' mean of each component; unowned ones as before."""
    G = {}
    for module, terms in iterate(updates):
        g, sent = state.G[module], [sent_to(state, module, d) for d in terms]
        changes = [
            LowRank(d.B - s.B, d.A - s.A, d.scaling) for d, s in zip(terms, sent, strict=True)
        ]
        mean = index_mean(changes, updates.weights, pad="owner")
        B, A = g.B.to(mean.B.dtype).clone(), g.A.to(mean.A.dtype).clone()
        B[:, : mean.rank] += mean.B
        A[: mean.rank] += mean.A
        G[module] = LowRank(B, A)
    return advance(state, G)
