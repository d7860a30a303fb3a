"""FlexLoRA with server memory: aggregate the changes clients made, not the weights they hold.

The update rule of FedHL (Peng, Zeng, Li, Li, Chen, Wang: Federated Learning for Heterogeneous
Low-Rank Adaptation via Unbiased Aggregation, 2025, arXiv 2505.18494) and of FedHera (2026), here
with weights by data size, on FlexLoRA's products (arXiv 2402.11505).

    G <- G + eta sum_k p_k (D_k - D_k_sent)

`D_k_sent` is the payload client k really got, at its rank and after the wire's rounding. With
`q_j = sum of p_k over clients with r_k >= j` and eta 1 this is `sum_k p_k D_k + U diag((1 - q_j)
sigma_j) Vh`: FlexLoRA plus exactly what small clients could not carry, so nothing collapses.
Small clients cannot see that tail, may learn it again, and it is then added twice: `fold` sends
them the tail as a frozen term, a smaller `eta` damps it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from flexlora.adapter import Adapter
from flexlora.federation.state import Client, Method, Payload, ServerState, Updates, iterate
from flexlora.lowrank import LowRank, Split, difference, svd_sum
from flexlora.methods.downlink import advance, draw_seed, pack, rounded, sent_to, view_of


def flexlora_memory(
    eta: float = 1.0, fold: bool = False, server_rank: int | None = None, split: Split = "B"
) -> Method:
    """FlexLoRA that remembers on the server what a round's clients could not hold.

    Args:
        eta: step on the averaged change; 1 replaces what every client saw.
        fold: also send `G - trunc_r(G)`, frozen, so that every client trains on all of G.
        server_rank: components kept, at most `min(d_out, d_in)` per module (which makes G exact);
            None: the largest client rank.
        split: as in FlexLoRA.

    Raises:
        ValueError: `eta` not above 0, or `server_rank` below 1.
    """
    if eta <= 0:
        raise ValueError(f"flexlora-memory: eta is {eta}; expected a number above 0, usually 1.")
    if server_rank is not None and server_rank < 1:
        raise ValueError(f"flexlora-memory: server_rank is {server_rank}; expected at least 1.")

    def downlink(state: ServerState, client: Client) -> Payload:
        payload = pack(state, client, split=split)
        return replace(payload, frozen=_tails(state, payload)) if fold else payload

    def aggregate(state: ServerState, updates: Updates) -> ServerState:
        G, p = {}, updates.weights
        for module, terms in iterate(updates):
            g = state.G[module]
            changes = [difference(d, sent_to(state, module, d, split)) for d in terms]
            seed = draw_seed(state, "fill", module)
            G[module] = svd_sum([g, *changes], [1.0, *(eta * w for w in p)], g.rank, seed)
        return advance(state, G)

    def view(state: ServerState, client: Client | None) -> Adapter:
        return state.G if fold else view_of(downlink)(state, client)

    def start(state: ServerState) -> ServerState:
        return replace(state, G={m: _widened(d, server_rank) for m, d in state.G.items()})

    return Method(
        name="flexlora-memory",
        downlink=downlink,
        aggregate=aggregate,
        view=view,
        mixed_ranks=True,
        linear=True,
        down="R (d_out + d_in)" if fold else "r (d_out + d_in)",
        citation="update rule of Peng et al.: FedHL: Federated Learning for Heterogeneous Low-Rank "
        "Adaptation via Unbiased Aggregation, 2025, arXiv 2505.18494",
        start=start,
    )


def _tails(state: ServerState, payload: Payload) -> dict[str, tuple[LowRank, ...]]:
    """What each module's head leaves out, where it leaves anything out."""
    tails = {m: state.G[m].suffix(d.rank) for m, d in payload.adapter.items()}
    return {m: (rounded(t, state.wire),) for m, t in tails.items() if t.rank}


def _widened(d: LowRank, rank: int | None) -> LowRank:
    """Zero components up to the server's rank; nobody is handed them before they are filled."""
    more = max(min(rank or d.rank, *d.shape) - d.rank, 0)
    pad = torch.nn.functional.pad
    return LowRank(pad(d.B, (0, more)), pad(d.A, (0, 0, 0, more)), d.scaling)
