"""Truncated SVD of a product: from its factors when that is cheaper, dense otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.lowrank.product import LowRank, stack


def svd(product: LowRank, rank: int, seed: int = 0) -> LowRank:
    """The best rank-`rank` approximation of a product, in SVD form, with exactly `rank` rows.

    Returns `LowRank(B = U_r S_r, A = Vh_r, scaling = 1)`, singular values descending (they are the
    norms of `B`'s columns). By Eckart-Young no matrix of rank `rank` is closer in any unitarily
    invariant norm, and prefixes of the result are the best approximations at every smaller rank.

    Where the numerical rank is below `rank`, the missing rows of `A` are orthonormal directions
    outside the row space and `B`'s columns zero (a client then still has `rank` rows to train).

    Cost: with `R = product.rank < min(d_out, d_in)`, thin QR of both factors and the SVD of an
    `(R, R)` core, `O((d_out + d_in) R^2 + R^3)`; otherwise the dense SVD.

    Args:
        product: any product, usually from :func:`~flexlora.lowrank.stack`.
        rank: rows wanted, at most `min(d_out, d_in)`.
        seed: of the directions that fill a degenerate rank.

    Raises:
        ValueError: `rank` below 1 or above `min(d_out, d_in)`.
    """
    d_out, d_in = product.shape
    if not 1 <= rank <= min(d_out, d_in):
        raise ValueError(
            f"svd: rank {rank} of a {d_out} x {d_in} matrix; expected 1 to {min(d_out, d_in)}."
        )
    dtype = torch.promote_types(product.B.dtype, torch.float32)
    B, A = product.B.to(dtype) * product.scaling, product.A.to(dtype)
    if product.rank < min(d_out, d_in):
        Qb, Rb = torch.linalg.qr(B)
        Qa, Ra = torch.linalg.qr(A.T)
        U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
        U, Vh = Qb @ U, Vh @ Qa.T
    else:
        U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    rounding = S[0] * max(d_out, d_in) * torch.finfo(dtype).eps
    found = int(S.gt(rounding).sum())
    if found < rank:
        Vh = complete_rows(Vh[:found], rank, seed)
        U, S = (
            torch.nn.functional.pad(U[:, :found], (0, rank - found)),
            torch.nn.functional.pad(S[:found], (0, rank - found)),
        )
    return LowRank(U * S, Vh)


def svd_sum(
    terms: Sequence[LowRank], weights: Sequence[float], rank: int, seed: int = 0
) -> LowRank:
    """The best rank-`rank` approximation of `sum_k w_k D_k`, in SVD form: see :func:`svd`."""
    return svd(stack(terms, weights), rank, seed)


def complete_rows(
    rows: Float[Tensor, "found d"], count: int, seed: int = 0
) -> Float[Tensor, "count d"]:
    """Orthonormal `rows` extended to `count` orthonormal rows by seeded random directions.

    >>> import torch
    >>> full = complete_rows(torch.eye(4)[:1], 3)
    >>> torch.allclose(full @ full.T, torch.eye(3), atol=1e-6)
    True
    """
    d = rows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(count - rows.shape[0], d, generator=generator, dtype=torch.float64)
    fresh = fresh.to(rows)
    for _ in range(2):  # twice is enough (Kahan): the second pass removes what rounding left
        fresh = fresh - (fresh @ rows.T) @ rows
        fresh = torch.linalg.qr(fresh.T)[0].T
    return torch.cat([rows, fresh])
