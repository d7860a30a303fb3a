"""Orthonormal rows that grow: the work between the products of a Krylov iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


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
            room = torch.cat([room, torch.empty_like(room)], 1)
        room[:, self.width : width] = Q
        return Basis(room, width)


def extend(
    known: Float[Tensor, "modules l d"], Y: Float[Tensor, "modules k d"]
) -> tuple[Float[Tensor, "modules q d"], Float[Tensor, "modules k p"]]:
    """`Q` orthonormal and orthogonal to `known`, and `C` with `Y = C [known; Q]`.

    `Q` has as many rows as `Y`, or as many as complete the basis. Projected out once where a tenth
    of `Y` or more is new in every direction, which leaves `10 eps` of what was known at most;
    otherwise twice ("twice is enough", Kahan). Where `Y` adds nothing, random rows do.
    """
    first, seed = Y @ known.mT, known.shape[1]
    rest = Y - first @ known
    Q, least = orthonormal(rest[:, : known.shape[2] - known.shape[1]], seed)
    longest = torch.nn.functional.pad(Y.norm(dim=2), (0, 1)).amax(1)  # of no rows: 0
    if not bool(least.gt(0.1 * longest).all()):
        Q, _ = orthonormal(Q - (Q @ known.mT) @ known, seed)
    return Q, torch.cat([first, rest @ Q.mT], 2)


def orthonormal(
    X: Float[Tensor, "modules k d"], seed: int = 0
) -> tuple[Float[Tensor, "modules k d"], Float[Tensor, " modules"]]:
    """Orthonormal rows that span those of `X`, `k <= d`, and how far `X` is from dependent rows.

    The latter is the smallest distance of a row to the span of those before it, or 0 where that is
    near rounding. By a Cholesky factor of `X X^T`, in float64: of float32 rows it loses nothing up
    to condition numbers of 1e7, in a fifth of the time of Householder's QR. That takes what is
    left, with random numbers at rounding level added: it would complete dependent rows by those of
    the identity, the same ones each time.
    """
    if X.dtype == torch.float32 and X.shape[1]:
        wide = X.double()
        L, failed = torch.linalg.cholesky_ex(wide @ wide.mT)
        if not bool(failed.any()):
            Q = torch.linalg.solve_triangular(L, wide, upper=False)
            return Q.to(X.dtype), L.diagonal(dim1=1, dim2=2).amin(1)
    noise = torch.randn(X.shape[1:], generator=torch.Generator().manual_seed(seed)).to(X)
    level = X.norm(dim=(1, 2), keepdim=True).clamp_min(1) * torch.finfo(X.dtype).eps
    return torch.linalg.qr((X + level * noise).mT)[0].mT, X.new_zeros(X.shape[0])


def small_svd(
    M: Float[Tensor, "modules m n"], rank: int
) -> tuple[Float[Tensor, "modules m rank"], Float[Tensor, "modules rank"]]:
    """Leading left singular vectors and values of a small matrix, `rank <= m`, in float64.

    Of a float32 matrix by the eigenvectors of `M M^T` in float64: all that float32 can hold, in
    half the time of an SVD in float32.
    """
    if M.dtype == torch.float64:
        U, S, _ = torch.linalg.svd(M)
        return U[..., :rank], torch.nn.functional.pad(S, (0, rank - S.shape[1]))[:, :rank]
    wide = M.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    return vectors[..., -rank:].flip(2), squares[:, -rank:].flip(1).clamp_min(0).sqrt()
