"""Exact factorisations: through the small core of the stacked factors, or of the dense sum."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Factors = tuple[
    Float[Tensor, "modules d_out k"], Float[Tensor, "modules k"], Float[Tensor, "modules k d_in"]
]
"""`U, S, Vh`, singular values descending."""


def core_svd(
    B: Float[Tensor, "modules d_out R"], A: Float[Tensor, "modules R d_in"], rank: int
) -> Factors:
    """Leading triples of `B @ A` by thin QR of both factors and the SVD of the `(R, R)` core.

    Cost `4 (d_out + d_in) R^2 + 24 R^3` FLOPs: for `R` well below `min(d_out, d_in)`.
    """
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Qb @ U[..., :rank], S[..., :rank], Vh[..., :rank, :] @ Qa.mT


def gram_svd(D: Float[Tensor, "modules d_out d_in"], rank: int) -> Factors:
    """Leading triples of a float32 matrix by the eigenvectors of its smaller Gram matrix.

    The Gram matrix squares the condition number: computed in float32 it would lose every direction
    below `sqrt(eps) = 3e-4` of the largest. In float64 it keeps them down to float32's own rounding
    (1e-8), so this path takes float32 input only. About half the time of a full SVD.
    """
    wide = D.shape[1] <= D.shape[2]
    M = (D if wide else D.mT).double()
    _, vectors = torch.linalg.eigh(M @ M.mT)
    U = vectors.flip(2)[:, :, :rank].to(D)
    # One step of the other side in float32: singular values and vectors from D itself.
    Q, R = torch.linalg.qr((D.mT if wide else D) @ U)
    X, S, Yh = torch.linalg.svd(R)
    left, right = U @ Yh.mT, Q @ X
    return (left, S, right.mT) if wide else (right, S, left.mT)


def dense_svd(D: Float[Tensor, "modules d_out d_in"]) -> Factors:
    """`torch.linalg.svd` of the matrix."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return U, S, Vh
