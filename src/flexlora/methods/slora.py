"""SLoRA: a few rounds of sparse fine-tuning, whose change then initialises LoRA.

Babakniya, Elkordy, Ezzeldin, Liu, Song, El-Khamy, Avestimehr: SLoRA: Federated Parameter Efficient
Fine-Tuning of Language Models, arXiv 2308.06522.

    stage 1:  values = sum_k p_k values_k on one random mask shared by all; W0 + mask(values)
    switch:   G = trunc_R(mask(values)),  the base returns to W0
    stage 2:  any rule that averages LoRA (FedAvg in the paper, FlexLoRA for mixed ranks)

During stage 1 the change is in the patch, and it leaves it at the switch: it is counted once. The
mask is drawn from the run's seed and never travels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flexlora.adapter import Adapter, stable_seed
from flexlora.federation.state import Client, Method, Payload, ServerState, Term, Updates, iterate
from flexlora.lowrank import LowRank, Mask, stack, svd
from flexlora.methods.downlink import draw_seed, pack
from flexlora.methods.fedavg import fedit


def slora(of: Method | None = None, rounds: int = 5, density: float = 0.0055) -> Method:
    """SLoRA: sparse first, then another method from there.

    Args:
        of: the rule of stage 2; FedIT by default, `flexlora` for mixed ranks.
        rounds: length of stage 1.
        density: share of each weight's entries that stage 1 trains; by default the share that the
            paper's smallest LoRA (rank 8 on all layers of a 1.3B model) trains.

    Raises:
        ValueError: `rounds` below 1, `density` outside (0, 1], or a second stage that is sparse,
            keeps state at its clients or has a patch of its own.
    """
    inner = fedit() if of is None else of
    if rounds < 1:
        raise ValueError(f"slora: rounds is {rounds}; stage 1 needs at least 1.")
    if inner.averages not in ("products", "factors") or not inner.stateless:
        raise ValueError(
            f"slora: stage 2 cannot be {inner.name!r}: it must average adapters on the server, "
            "because stage 1 hands it one. Use fedavg, fedit or flexlora."
        )

    def downlink(state: ServerState, client: Client) -> Payload:
        if state.round < rounds:
            return send_sparse(state, client, density)
        return inner.downlink(state, client)

    def aggregate(state: ServerState, updates: Updates) -> ServerState:
        if state.round >= rounds:
            return inner.aggregate(state, updates)
        after = mean_sparse(state, updates, density)
        return after if after.round < rounds else _switched(after)

    def view(state: ServerState, client: Client | None) -> Adapter:
        return state.G if state.round < rounds else inner.view(state, client)

    def start(state: ServerState) -> ServerState:
        if any(d.B.any() for d in state.G.values()):
            raise ValueError(
                "slora: a warm start is refused: stage 1 makes the adapter that stage 2 "
                "starts from. Start stage 2's method from that adapter instead."
            )
        return inner.start(state)

    return Method(
        name="slora",
        downlink=downlink,
        aggregate=aggregate,
        view=view,
        mixed_ranks=inner.mixed_ranks,
        linear=inner.linear,
        optimizer=inner.optimizer,
        trains=f"a sparse mask for {rounds} rounds, then {inner.trains}",
        up=f"{density} d_out d_in, then {inner.up}",
        down=f"{density} d_out d_in, then {inner.down}",
        citation="Babakniya et al.: SLoRA: Federated Parameter Efficient Fine-Tuning of Language "
        "Models, arXiv 2308.06522",
        start=start,
    )


def mask_of(state: ServerState, module: str, density: float) -> Mask:
    """The run's mask at one module: at least one entry."""
    d_out, d_in = state.G[module].shape
    count = max(1, round(density * d_out * d_in))
    return Mask((d_out, d_in), count, stable_seed(state.seed, "sparse mask", module))


def send_sparse(state: ServerState, client: Client, density: float) -> Payload:
    """A payload that trains the masked entries, from the values the server holds.

    Raises:
        ValueError: `density` outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; expected a share of entries above 0, at most 1.")
    adapter, mask = {}, {m: mask_of(state, m, density) for m in state.G}
    for module, g in state.G.items():
        values = mask[module].of(dense(state.patch.get(module), g))
        adapter[module] = LowRank(values[:, None], g.A.new_ones(1, 1))
    payload = pack(replace(state, patch={}), client, adapter)
    return replace(payload, train="B", known="A", mask=mask)


def mean_sparse(state: ServerState, updates: Updates, density: float) -> ServerState:
    """The clients' mean values, as a dense change in the patch."""
    patch: dict[str, Term] = {}
    for module, terms in iterate(updates):
        values = stack(terms, updates.weights).dense()[:, 0]
        patch[module] = mask_of(state, module, density).dense(values)
    return replace(state, round=state.round + 1, patch=patch)


def _switched(state: ServerState) -> ServerState:
    """Stage 1's change becomes the adapter; the base is W0 again."""
    G = {}
    for module, g in state.G.items():
        change = dense(state.patch[module], g)
        identity = torch.eye(change.shape[1]).to(change)
        seed = draw_seed(state, "fill", module)
        G[module] = svd(LowRank(change, identity), g.rank, seed)
    return replace(state, G=G, patch={})


def dense(term: Term | None, like: LowRank) -> Tensor:
    """A patch term as a matrix; absent is zero."""
    if term is None:
        return like.B.new_zeros(like.shape)
    return term if isinstance(term, Tensor) else term.dense()
