"""raFLoRA: sum products, each rank partition weighted over the clients that own it.

arXiv 2602.13486 (rank collapse in federated low-rank adaptation; its formula was read in a port).

    D = sum over partitions (l, h] of sum_{k: r_k >= h} (n_k / n_owners) s_k B_k[:, l:h] A_k[l:h]
    G = trunc_R(D)

Partitions end at the ranks of the cohort; within one, the owners are the same, so component j of
client k simply has weight `p_k / q_j`. A partition that nobody in the cohort owns keeps its part of
the old G. Components are a client's own rows, so the result depends on the gauge of its factors.
"""

from __future__ import annotations

from flexlora.federation.state import Client, Method, Payload, ServerState, Updates, iterate
from flexlora.lowrank import LowRank, Split, owned, stack, svd
from flexlora.methods.downlink import advance, draw_seed, pack, view_of


def raflora(split: Split = "B") -> Method:
    """raFLoRA: FlexLoRA with components re-weighted over their owners.

    Args:
        split: as in FlexLoRA.
    """

    def downlink(state: ServerState, client: Client) -> Payload:
        return pack(state, client, split=split)

    return Method(
        name="raflora",
        downlink=downlink,
        aggregate=aggregate,
        view=view_of(downlink),
        mixed_ranks=True,
        linear=True,
        citation="raFLoRA, arXiv 2602.13486",
    )


def aggregate(state: ServerState, updates: Updates) -> ServerState:
    """The owners' weighted sum of products and the old unowned partition, truncated."""
    G = {}
    for module, terms in iterate(updates):
        g, p = state.G[module], updates.weights
        q = owned(terms, p).to(terms[0].B)
        shared = [LowRank(d.B / q[: d.rank], d.A, d.scaling) for d in terms]
        total = stack([*shared, g.suffix(len(q))], [*p, 1.0])
        G[module] = svd(total, g.rank, draw_seed(state, "fill", module))
    return advance(state, G)
