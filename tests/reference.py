"""Every server rule a second time: dense matrices, plain loops, slow on purpose.

A rule maps `(state before, module, terms, weights)` to the new change of the weight, dense.
Nothing here uses the package's arithmetic: products are `scaling * B @ A`, factors are averaged
entry by entry, and a missing component is a `continue`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexlora.federation.state import ServerState
from flexlora.lowrank import LowRank

Terms = list[LowRank]
Weights = tuple[float, ...]


def product(d: LowRank | Tensor) -> Tensor:
    return d if isinstance(d, Tensor) else d.scaling * (d.B @ d.A)


def patch_of(state: ServerState, module: str) -> Tensor:
    if module not in state.patch:
        return torch.zeros(state.G[module].shape, dtype=torch.float64)
    return product(state.patch[module])


def trunc(D: Tensor, rank: int) -> Tensor:
    """The best rank-`rank` approximation."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]


def mean_product(terms: Terms, weights: Weights) -> Tensor:
    """`sum_k p_k s_k B_k A_k`."""
    total = torch.zeros(terms[0].shape, dtype=torch.float64)
    for p, d in zip(weights, terms, strict=True):
        total += p * product(d)
    return total


def mean_factors(
    g: LowRank, terms: Terms, weights: Weights, owners_only: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Column by column, row by row; a component that nobody holds is the server's."""
    columns, rows = [], []
    for j in range(g.rank):
        column, row, q = 0 * g.B[:, j], 0 * g.A[j], 0.0
        for p, d in zip(weights, terms, strict=True):
            if j >= d.rank:
                continue
            column, row, q = column + p * d.scaling * d.B[:, j], row + p * d.A[j], q + p
        if q == 0:
            column, row = g.B[:, j], g.A[j]
        elif owners_only:
            column, row = column / q, row / q
        columns.append(column)
        rows.append(row)
    return columns, rows


def outer_sum(columns: list[Tensor], rows: list[Tensor]) -> Tensor:
    return sum(torch.outer(b, a) for b, a in zip(columns, rows, strict=True))


def flexlora(state: ServerState, module: str, terms: Terms, weights: Weights) -> Tensor:
    return trunc(mean_product(terms, weights), state.G[module].rank)


def flexlora_released(state: ServerState, module: str, terms: Terms, weights: Weights) -> Tensor:
    """The release: 16 / r in place of each client's scaling."""
    total = torch.zeros(terms[0].shape, dtype=torch.float64)
    for p, d in zip(weights, terms, strict=True):
        total += p * (16 / d.rank) * (d.B @ d.A)
    return trunc(total, state.G[module].rank)


def flexlora_memory(state: ServerState, module: str, terms: Terms, weights: Weights) -> Tensor:
    """`sum p_k D_k + U diag((1 - q) sigma) Vh`, with no subtraction of what was sent."""
    g = state.G[module]
    total = mean_product(terms, weights)
    for j in range(g.rank):
        q = sum(p for p, d in zip(weights, terms, strict=True) if j < d.rank)
        total += (1 - q) * torch.outer(g.B[:, j], g.A[j])
    return trunc(total, g.rank)


def fedavg(state: ServerState, module: str, terms: Terms, weights: Weights) -> Tensor:
    return outer_sum(*mean_factors(state.G[module], terms, weights, owners_only=False))


def hetlora(state: ServerState, module: str, terms: Terms, weights: Weights) -> Tensor:
    """Without pruning: see test_hetlora.py for that."""
    norms = [float(torch.linalg.matrix_norm(product(d))) for d in terms]
    shares = tuple(n / sum(norms) for n in norms)
    return outer_sum(*mean_factors(state.G[module], terms, shares, owners_only=False))


def rbla(state: ServerState, module: str, terms: Terms, weights: Weights) -> Tensor:
    return outer_sum(*mean_factors(state.G[module], terms, weights, owners_only=True))


def raflora(state: ServerState, module: str, terms: Terms, weights: Weights) -> Tensor:
    """Partition by partition, between the sorted ranks of the cohort."""
    g, low = state.G[module], 0
    total = torch.zeros(g.shape, dtype=torch.float64)
    for high in sorted({d.rank for d in terms}):
        owners = sum(p for p, d in zip(weights, terms, strict=True) if d.rank >= high)
        for p, d in zip(weights, terms, strict=True):
            if d.rank >= high:
                total += p / owners * d.scaling * (d.B[:, low:high] @ d.A[low:high])
        low = high
    return trunc(total + g.B[:, low:] @ g.A[low:], g.rank)


def into_patch(state: ServerState, module: str, terms: Terms, weights: Weights) -> Tensor:
    """FLoRA, FedEx-LoRA: exact."""
    return patch_of(state, module) + mean_product(terms, weights)


def exact(state: ServerState, module: str, terms: Terms, weights: Weights) -> Tensor:
    """FFA-LoRA, RoLoRA: one common factor, so the mean of the other is the mean of the products."""
    return mean_product(terms, weights)


def untouched(state: ServerState, module: str, terms: Terms, weights: Weights) -> Tensor:
    """FedSA-LoRA, whose B is at the clients."""
    return torch.zeros(state.G[module].shape, dtype=torch.float64)


def sparse(state: ServerState, module: str, terms: Terms, weights: Weights) -> Tensor:
    """SLoRA's first stage and full fine-tuning: values scattered entry by entry."""
    from flexlora.methods.slora import mask_of

    g = state.G[module]
    density = terms[0].B.numel() / (g.shape[0] * g.shape[1])
    change = torch.zeros(g.shape[0] * g.shape[1], dtype=torch.float64)
    for p, d in zip(weights, terms, strict=True):
        for position, value in zip(mask_of(state, module, density).positions(), d.B, strict=True):
            change[position] += p * value.item()
    return change.view(g.shape)


RULES = {
    "flexlora": flexlora,
    "flexlora-released": flexlora_released,
    "flexlora-memory": flexlora_memory,
    "fedavg": fedavg,
    "fedit": fedavg,
    "hetlora": hetlora,
    "rbla": rbla,
    "raflora": raflora,
    "flora": into_patch,
    "ffa-lora": exact,
    "rolora": exact,
    "fedsa-lora": untouched,
    "fedex-lora": into_patch,
    "slora": sparse,
    "full": sparse,
    "fedprox": flexlora,
}
