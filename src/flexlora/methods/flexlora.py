"""FlexLoRA: average the updates themselves, hand each client the best approximation it can hold.

Bai, Chen, Qian, Yao, Li: Federated Fine-tuning of Large Language Models under Heterogeneous Tasks
and Client Resources, NeurIPS 2024, arXiv 2402.11505.

    D        = sum_k p_k s_k B_k A_k        per module, every client with its own scaling s_k
    U, S, Vh = svd(D)                       kept at the largest rank
    client k gets  A = Vh[:r_k],  B = U[:, :r_k] S[:r_k] / s_k

Products are averaged, so unequal ranks need no padding and nothing depends on the gauge of the
factors; what a client at rank r gets is the closest rank-r matrix to D. The price: with no training
at all, direction j keeps only the share `sum of p_k over clients with r_k >= j` of itself a round.
"""

from __future__ import annotations

from dataclasses import replace

from flexlora.federation.state import Client, Method, Payload, ServerState, Updates, iterate
from flexlora.lowrank import LowRank, Split, svd_sum
from flexlora.methods.downlink import advance, draw_seed, pack, view_of

CITATION = (
    "Bai, Chen, Qian, Yao, Li: Federated Fine-tuning of Large Language Models under Heterogeneous "
    "Tasks and Client Resources, NeurIPS 2024, arXiv 2402.11505"
)


def flexlora(split: Split = "B", assumed_alpha: float | None = None) -> Method:
    """FlexLoRA as the paper describes it.

    Args:
        split: which factor carries the singular values on the way down: `B` (the release), `A`, or
            the root on both (`balanced`). The update is the same, the steps that follow are not.
        assumed_alpha: if given, the server takes every scaling to be `assumed_alpha / r`, whatever
            the client trains with; see :func:`flexlora_released`.

    >>> flexlora(split="balanced").mixed_ranks
    True
    """

    def downlink(state: ServerState, client: Client) -> Payload:
        payload = pack(state, client, split=split)
        if assumed_alpha is None:
            return payload
        return replace(payload, adapter={m: _given(d) for m, d in payload.adapter.items()})

    def aggregate(state: ServerState, updates: Updates) -> ServerState:
        G = {}
        for module, terms in iterate(updates):
            terms = terms if assumed_alpha is None else [_assumed(d) for d in terms]
            seed = draw_seed(state, "fill", module)
            G[module] = svd_sum(terms, updates.weights, state.G[module].rank, seed)
        return advance(state, G)

    def _assumed(d: LowRank) -> LowRank:
        return LowRank(d.B, d.A, (assumed_alpha or 0.0) / d.rank)

    def _given(d: LowRank) -> LowRank:
        return LowRank(d.rescaled(_assumed(d).scaling).B, d.A, d.scaling)

    return Method(
        name="flexlora",
        downlink=downlink,
        aggregate=aggregate,
        view=view_of(downlink),
        mixed_ranks=True,
        exact=True,
        linear=True,
        citation=CITATION,
    )


def flexlora_released(assumed_alpha: float = 16.0) -> Method:
    """The arithmetic of the authors' release: every scaling is taken to be `16 / r`.

    The server multiplies a client's product by `16 / r_k` and divides by it on the way down: right
    at alpha 16 without rsLoRA, off by a factor elsewhere. That the release never applies the ranks
    is a matter of the experiment's rank plan, not of this rule.

    Args:
        assumed_alpha: the constant that stands in the release's code.
    """
    return replace(flexlora(assumed_alpha=assumed_alpha), name="flexlora-released", exact=False)
