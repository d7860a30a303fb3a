"""raFLoRA: sum products, each rank partition weighted over the clients that own it.

Wu, Hu, Min, Wang: Preventing Rank Collapse in Federated Low-Rank Adaptation with Client
Heterogeneity, 2026, arXiv 2602.13486 (the rule below was read in a port of it).

    D = sum over partitions (l, h] of sum_{k: r_k >= h} (n_k / n_owners) s_k B_k[:, l:h] A_k[l:h]
    G = trunc_R(D)

Partitions end at the ranks of the cohort; within one, the owners are the same, so component j of
client k simply has weight `p_k / q_j`. A partition that nobody in the cohort owns keeps its part of
the old G. Components are a client's own rows, so the result depends on the gauge of its factors.
Computed as `G + sum (p_k / q_j) (D_k - D_k_sent)`: the same, since what was sent sums to the owned
part of G, and without training G stays as it is at any precision of the wire.
"""

from __future__ import annotations

from flexlora.federation.state import Client, Method, Payload, ServerState, Updates, iterate
from flexlora.lowrank import LowRank, Split, difference, owned, svd_sum
from flexlora.methods.downlink import advance, draw_seed, pack, sent_to, view_of


def raflora(split: Split = "B") -> Method:
    """raFLoRA: FlexLoRA with components re-weighted over their owners.

    Args:
        split: as in FlexLoRA.
    """

    def downlink(state: ServerState, client: Client) -> Payload:
        return pack(state, client, split=split)

    def aggregate(state: ServerState, updates: Updates) -> ServerState:
        G, p = {}, updates.weights
        for module, terms in iterate(updates):
            g, q = state.G[module], owned(terms, p).to(terms[0].B)
            changes = [difference(d, sent_to(state, module, d, split)) for d in terms]
            shared = [LowRank(c.B / q[: c.rank // 2].repeat(2), c.A, c.scaling) for c in changes]
            seed = draw_seed(state, "fill", module)
            G[module] = svd_sum([g, *shared], [1.0, *p], g.rank, seed)
        return advance(state, G)

    return Method(
        name="raflora",
        downlink=downlink,
        aggregate=aggregate,
        view=view_of(downlink),
        mixed_ranks=True,
        linear=True,
        citation="Wu et al.: Preventing Rank Collapse in Federated Low-Rank Adaptation with Client "
        "Heterogeneity, 2026, arXiv 2602.13486",
    )
