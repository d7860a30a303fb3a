"""Orthonormal rows that grow: the work between the products of a Krylov iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

PASSES = 5
"""At most, of projecting out what is known."""


@dataclass(frozen=True)
class Basis:
    """Orthonormal rows, with room for more: on a CPU, memory not written yet costs nothing."""

    room: Float[Tensor, "modules room d"]
    width: int

    @property
    def rows(self) -> Float[Tensor, "modules l d"]:
        """Those there are."""
        return self.room[:, : self.width]

    @property
    def full(self) -> bool:
        """Whether they span everything."""
        return self.width == self.room.shape[2]

    def with_(self, Q: Float[Tensor, "modules q d"]) -> Basis:
        """More rows, written beside these."""
        room, width = self.room, self.width + Q.shape[1]
        if width > room.shape[1]:
            room = room.new_empty(room.shape[0], 2 * width, room.shape[2])
            room[:, : self.width] = self.rows
        room[:, self.width : width] = Q
        return Basis(room, width)


def extend(
    known: Float[Tensor, "modules l d"], Y: Float[Tensor, "modules k d"]
) -> tuple[Float[Tensor, "modules q d"], Float[Tensor, "modules k p"]]:
    """`Q` orthonormal and orthogonal to `known`, and `C` with `Y = C [known; Q]`.

    `Q` has as many rows as `Y`, or as many as complete the basis. Projected out once where a fifth
    of `Y` or more is new in every direction, which leaves `5 eps` of what was known;
    otherwise again ("twice is enough", Kahan), from rows of length 1, and more often only where `Y`
    adds nothing and random rows do.
    """
    first, seed = Y @ known.mT, known.shape[1]
    rest = torch.baddbmm(Y, first, known, alpha=-1)
    Q, least = orthonormal(rest[:, : known.shape[2] - known.shape[1]], seed)
    longest = torch.nn.functional.pad(Y.norm(dim=2), (0, 1)).amax(1)  # of no rows: 0
    for _ in range(PASSES):
        if bool(least.gt(0.2 * longest).all()):
            break
        Q, least = orthonormal(torch.baddbmm(Q, Q @ known.mT, known, alpha=-1), seed)
        longest = torch.ones_like(longest)
    return Q, torch.cat([first, rest @ Q.mT], 2)


def orthonormal(
    X: Float[Tensor, "modules k d"], seed: int = 0
) -> tuple[Float[Tensor, "modules k d"], Float[Tensor, " modules"]]:
    """Orthonormal rows that span those of `X`, `k <= d`, and how far `X` is from dependent rows.

    The latter is the smallest distance of a row to the span of those before it, 0 near rounding. By
    a Cholesky factor of `X X^T`, in float64: float32 rows come out orthonormal to their rounding up
    to condition numbers of 1e4, and after one more pass up to 1e7, in a fifth of the time of
    Householder's QR. That takes what is left, with random numbers at rounding level added: it would
    complete dependent rows by those of the identity, the same ones each time.
    """
    if X.dtype == torch.float32 and X.shape[1]:
        wide = X.double()
        L, failed = torch.linalg.cholesky_ex(wide @ wide.mT)
        if not bool(failed.any()):
            torch.linalg.solve_triangular(L, wide, upper=False, out=wide)
            return wide.to(X.dtype), L.diagonal(dim1=1, dim2=2).amin(1)
    noise = torch.randn(X.shape[1:], generator=torch.Generator().manual_seed(seed)).to(X)
    level = X.norm(dim=(1, 2), keepdim=True).clamp_min(1) * torch.finfo(X.dtype).eps
    Q, R = torch.linalg.qr((X + level * noise).mT)
    heights = torch.nn.functional.pad(R.diagonal(dim1=1, dim2=2).abs(), (0, 1), value=torch.inf)
    least = heights.amin(1)
    return Q.mT, torch.where(least > 10 * level[:, 0, 0] * X.shape[2] ** 0.5, least, 0.0)


def small_svd(
    M: Float[Tensor, "modules m n"], rank: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "modules m rank"], Float[Tensor, "modules rank"]]:
    """Leading left singular vectors and values of a small float64 matrix, `rank <= m`.

    As exact as numbers of `dtype` need: for float32 by the eigenvectors of `M M^T`, which tell
    singular values down to 1e-8 of the largest apart, in half the time of an SVD in float32.
    """
    if dtype == torch.float64:
        U, S, _ = torch.linalg.svd(M)
        return U[..., :rank], torch.nn.functional.pad(S, (0, rank - S.shape[1]))[:, :rank]
    squares, vectors = torch.linalg.eigh(M @ M.mT)
    return vectors[..., -rank:].flip(2), squares[:, -rank:].flip(1).clamp_min(0).sqrt()
