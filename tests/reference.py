"""Every server rule a second time: dense matrices, plain loops, slow on purpose.

A rule maps `(state before, clients, updates)` to the new change of one module's weight, dense, as
the largest client sees it. Nothing here uses the package's arithmetic: products are formed by
`scaling * B @ A`, factors are averaged entry by entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexlora.lowrank import LowRank


def product(d: LowRank) -> Tensor:
    return d.scaling * (d.B @ d.A)


def trunc(D: Tensor, rank: int) -> Tensor:
    """The best rank-`rank` approximation."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]


def mean_product(terms: list[LowRank], weights: tuple[float, ...]) -> Tensor:
    """`sum_k p_k s_k B_k A_k`."""
    total = torch.zeros(terms[0].shape, dtype=torch.float64)
    for p, d in zip(weights, terms, strict=True):
        total += p * product(d)
    return total


def flexlora(terms: list[LowRank], weights: tuple[float, ...], rank: int) -> Tensor:
    return trunc(mean_product(terms, weights), rank)


def flexlora_released(terms: list[LowRank], weights: tuple[float, ...], rank: int) -> Tensor:
    """The release: 16 / r in place of each client's scaling."""
    total = torch.zeros(terms[0].shape, dtype=torch.float64)
    for p, d in zip(weights, terms, strict=True):
        total += p * (16 / d.rank) * (d.B @ d.A)
    return trunc(total, rank)


def fedavg(terms: list[LowRank], weights: tuple[float, ...]) -> Tensor:
    """`(sum_k p_k s_k B_k) (sum_k p_k A_k)`."""
    B = torch.zeros_like(terms[0].B)
    A = torch.zeros_like(terms[0].A)
    for p, d in zip(weights, terms, strict=True):
        B += p * d.scaling * d.B
        A += p * d.A
    return B @ A
