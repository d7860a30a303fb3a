"""Means of factors component by component, and the weights that go into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.lowrank.product import LowRank, norm


def index_mean(
    terms: Sequence[LowRank], weights: Sequence[float], pad: Literal["zero", "owner"] = "zero"
) -> LowRank:
    """Weighted mean of the factors, component by component, at the largest rank; scaling 1.

    Every scaling is folded into its `B` first: `B_j = sum_k w_k s_k B_kj / q_j`, `A_j = sum_k w_k
    A_kj / q_j`, over the clients `k` that hold component `j`. With `pad="zero"` the others count as
    zeros, `q_j = sum_k w_k`; with `pad="owner"` they do not count, `q_j = sum of the owners' w_k`.
    The product of mean factors is not the mean of the products, and it depends on the gauge.

    Raises:
        ValueError: no terms.

    >>> import torch
    >>> x, y = (LowRank(torch.ones(2, r), torch.ones(r, 3)) for r in (1, 2))
    >>> index_mean([x, y], [0.5, 0.5]).A[:, 0].tolist()
    [1.0, 0.5]
    >>> index_mean([x, y], [0.5, 0.5], pad="owner").A[:, 0].tolist()
    [1.0, 1.0]
    """
    share = owned(terms, weights)
    if pad == "zero":
        share = torch.full_like(share, sum(weights))
    dtype = torch.promote_types(terms[0].B.dtype, torch.float32)
    (d_out, d_in), rank = terms[0].shape, len(share)
    B, A = (
        terms[0].B.new_zeros(d_out, rank, dtype=dtype),
        terms[0].A.new_zeros(rank, d_in, dtype=dtype),
    )
    for t, w in zip(terms, weights, strict=True):
        B[:, : t.rank] += t.B.to(dtype) * (w * t.scaling)
        A[: t.rank] += t.A.to(dtype) * w
    share = share.to(B)
    return LowRank(B / share, A / share[:, None])


def owned(terms: Sequence[LowRank], weights: Sequence[float]) -> Float[Tensor, " rank"]:
    """Weight of the clients that hold component `j`, for every `j` up to the largest rank; float64.

    Raises:
        ValueError: no terms.
    """
    if not terms:
        raise ValueError("no terms; a mean over nobody has no shape. Expected at least one.")
    share = torch.zeros(max(t.rank for t in terms), dtype=torch.float64)
    for t, w in zip(terms, weights, strict=True):
        share[: t.rank] += w
    return share


def norm_weights(terms: Sequence[LowRank]) -> list[float]:
    """Weights in proportion to the products' Frobenius norms; equal ones where all are zero."""
    norms = [norm(t) for t in terms]
    total = sum(norms)
    return [n / total if total > 0 else 1 / len(terms) for n in norms]
