"""FLoRA: stack the factors, merge the sum into the base, start every round from new factors.

Wang, Shen, He, Sun, Wang, Lyu, Li: FLoRA: Federated Fine-Tuning Large Language Models with
Heterogeneous Low-Rank Adaptations, NeurIPS 2024, arXiv 2409.05976.

    patch <- patch + sum_k p_k s_k B_k A_k        stacked while that is smaller than the matrix
    G     <- A drawn anew, B = 0

Exact at any mixture of ranks, and nothing is truncated; the price is the downlink, `sum_k r_k` rows
a round until the dense change is smaller. The base weight itself is never written.
"""

from __future__ import annotations

from dataclasses import replace

from flexlora.adapter import stable_seed
from flexlora.federation.state import Client, Method, Payload, ServerState, Updates, iterate
from flexlora.lowrank import merge, stack
from flexlora.methods.downlink import drawn, pack, restarted, view_of


def flora() -> Method:
    """FLoRA: exact sums into the patch, factors restarted each round.

    >>> flora().exact, flora().averages
    (True, 'patch')
    """
    return Method(
        name="flora",
        downlink=downlink,
        aggregate=aggregate,
        view=view_of(downlink),
        mixed_ranks=True,
        exact=True,
        linear=True,
        averages="patch",
        down="min(rounds sum_k r_k (d_out + d_in), d_out d_in)",
        citation="Wang et al.: FLoRA: Federated Fine-Tuning Large Language Models with "
        "Heterogeneous Low-Rank Adaptations, NeurIPS 2024, arXiv 2409.05976",
        start=restarted,
    )


def downlink(state: ServerState, client: Client) -> Payload:
    """The patch, and new factors that a client can draw itself."""
    return replace(pack(state, client), known="AB", seed=round_seed(state, state.round))


def aggregate(state: ServerState, updates: Updates) -> ServerState:
    """Everyone's product joins the patch."""
    patch = dict(state.patch)
    for module, terms in iterate(updates):
        patch[module] = merge(patch.get(module), stack(terms, updates.weights))
    G = drawn(state.G, round_seed(state, state.round + 1))
    return replace(state, round=state.round + 1, G=G, patch=patch)


def round_seed(state: ServerState, finished: int) -> int:
    """The seed of the factors handed out after `finished` rounds; the run's own at first."""
    return stable_seed(state.seed, "FLoRA restart", finished) if finished else state.seed
