"""Geometry of a cohort in product space: all inner products at once, from factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.lowrank.product import LowRank

ROWS_BYTES = 2**27
"""Memory for the dense rows of all updates that are held at once."""


def gram(terms: Sequence[LowRank]) -> Float[Tensor, "K K"]:
    """The Gram matrix `<D_i, D_j>_F` of a cohort's updates, float64, on the CPU.

    For robust weights, cosines and clipping: distances are `G_ii + G_jj - 2 G_ij`. From factors,
    `<D_i, D_j> = s_i s_j sum((B_i^T B_j) * (A_i A_j^T))`, `2 R^2 (d_out + d_in)` FLOPs with
    `R = sum r_k`; where that is more than forming the updates, a few rows of all of them at a
    time: `2 d_out d_in (R + K^2)` FLOPs. Memory: 128 MB of rows, or two `R x R` matrices.

    Raises:
        ValueError: no terms, or unequal shapes.

    >>> import torch
    >>> x = LowRank(torch.ones(2, 1), torch.ones(1, 3), 2.0)
    >>> gram([x, x.prefix(1)]).tolist()
    [[24.0, 24.0], [24.0, 24.0]]
    """
    shapes = {t.shape for t in terms}
    if len(shapes) != 1:
        raise ValueError(f"gram: terms must have one shape (d_out, d_in), got {sorted(shapes)}.")
    (d_out, d_in), K = terms[0].shape, len(terms)
    R = sum(t.rank for t in terms)
    if R * R * (d_out + d_in) <= d_out * d_in * (R + K * K):
        return _from_factors(terms)
    total = torch.zeros(K, K, dtype=torch.float64)
    step = max(1, ROWS_BYTES // (8 * K * d_in))
    for start in range(0, d_out, step):
        part = torch.stack([_rows(t, start, start + step).flatten() for t in terms])
        total += (part @ part.T).cpu()
    return total


def _from_factors(terms: Sequence[LowRank]) -> Float[Tensor, "K K"]:
    B = torch.cat([t.B.double() * t.scaling for t in terms], 1)
    A = torch.cat([t.A.double() for t in terms])
    pairs = ((B.T @ B) * (A @ A.T)).cpu()
    owner = torch.repeat_interleave(torch.tensor([t.rank for t in terms]))
    rows = torch.zeros(len(terms), pairs.shape[1], dtype=torch.float64).index_add_(0, owner, pairs)
    return torch.zeros(len(terms), len(terms), dtype=torch.float64).index_add_(1, owner, rows)


def _rows(term: LowRank, start: int, stop: int) -> Float[Tensor, "rows d_in"]:
    return (term.B[start:stop].double() * term.scaling) @ term.A.double()
