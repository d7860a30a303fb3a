"""Randomized block Krylov iteration: the head of a matrix from products with it alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.lowrank.estimate import Estimate, Triples, missing
from flexlora.lowrank.operators import Operator

PROBES = 8
"""Gaussian columns that measure the energy outside the subspace (seen by nothing else)."""

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 64


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns, with room for more: on a CPU, memory not written yet costs nothing."""

    room: Float[Tensor, "modules room d"]
    width: int

    @property
    def columns(self) -> Float[Tensor, "modules d l"]:
        """Those there are."""
        return self.room[:, : self.width].mT

    def with_(self, Q: Float[Tensor, "modules d q"]) -> Basis:
        """More columns, written beside these."""
        room, width = self.room, self.width + Q.shape[2]
        if width > room.shape[1]:
            room = torch.cat([room, torch.empty_like(room)], 1)
        room[:, self.width : width] = Q.mT
        return Basis(room, width)


@dataclass(frozen=True)
class Subspace:
    """Orthonormal bases grown so far, with `D^T U = V T` to rounding.

    Attributes:
        left: `U`, `(modules, d_out, l)`.
        right: `V`, `(modules, d_in, v)`; the last `new` columns have not been multiplied with `D`.
        T: `(modules, v, l)`.
        new: width of the newest block of `V`.
    """

    left: Basis
    right: Basis
    T: Float[Tensor, "modules v l"]
    new: int

    @property
    def U(self) -> Float[Tensor, "modules d_out l"]:
        """The columns of `left`."""
        return self.left.columns

    @property
    def V(self) -> Float[Tensor, "modules d_in v"]:
        """The columns of `right`."""
        return self.right.columns

    @property
    def width(self) -> int:
        """`l`."""
        return self.left.width

    @property
    def complete(self) -> bool:
        """Whether `U` holds every direction there is."""
        return self.width == min(self.U.shape[1], self.V.shape[1])

    def squares(self, rows: int) -> Float[Tensor, "modules l"]:
        """Squared singular values of `U^T D` in the first `rows` directions of `V`, descending.

        In float64: `T` only ever grows, so that their growth is not lost in rounding.
        """
        T = self.T[:, :rows].double()
        squares: Tensor = torch.linalg.eigvalsh(T.mT @ T)
        return squares.flip(1).clamp_min(0)

    @property
    def newest(self) -> Float[Tensor, "modules d_in new"]:
        """The newest block of `V`."""
        return self.V[..., self.V.shape[2] - self.new :]


def block_size(rank: int) -> int:
    """Columns per step: a third of the rank, a multiple of 8, 16 to 64.

    Small blocks need fewer products for the same accuracy, large ones run faster; 64 columns reach
    four fifths of the machine's speed.
    """
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, -(-rank // 24) * 8))


def expected_width(rank: int, limit: int) -> int:
    """Columns of the subspace at which a noisy spectrum is usually resolved to 1 %."""
    return min(2 * rank + block_size(rank), limit)


def block_krylov(
    D: Operator,
    rank: int,
    seed: int,
    tolerance: float,
    direction_tolerance: float,
    like: Tensor,
) -> Triples:
    """The leading `rank` singular triples from products with `D` and `D^T`, to a tolerance.

    Builds orthonormal bases `U` and `V` of `span(D X, (D D^T) D X, ...)` and
    `span(X, (D^T D) X, ...)` for a Gaussian `X` of `block_size(rank)` columns, block by block, and
    takes the SVD of `U^T D`. The subspace grows until both hold: the Frobenius error is within
    `1 + tolerance` of the best at this rank, and each singular value within `direction_tolerance`
    of its own (a small excess in Frobenius norm alone can hide a garbage tail).

    The estimates: subspaces are nested, so each `s_j^2` only grows (Cauchy interlacing); what is
    missing from it is extrapolated from its last increment as a geometric series, twice. The
    energy outside the subspace is measured on 8 independent Gaussian columns (relative standard
    deviation `sqrt(2 / (8 effective rank of the tail))`). Before the end these columns also look
    for a direction outside that belongs inside: Krylov spaces see a value repeated more often than
    their block is wide only in part, and their increments cannot tell.

    Cost: `2 l` columns through `D`, `l` about twice the rank (less for a steep spectrum, more
    for a flat one); orthogonalisation `12 (d_out + d_in) l^2` FLOPs. Random: the start and
    the probes, from `seed`. Not for ranks near `min(d_out, d_in)`: an exact SVD is cheaper there.

    Source: Musco and Musco, Randomized Block Krylov Methods for Stronger and Faster Approximate
    Singular Value Decomposition, NeurIPS 2015, arXiv 1504.05477, Algorithm 2; Tropp and Webber,
    Randomized algorithms for low-rank matrix approximation, 2023, arXiv 2306.12418. Ours keeps
    the coefficients of the orthogonalisation, so that the small SVD needs no further product, and
    stops by the estimates above. A start from the average of the clients' `A` was tried: fewer
    products, but its increments say little about what is missing, so the estimates failed.
    """
    modules, d_out, d_in = D.shape
    limit = min(d_out, d_in)
    block = min(block_size(rank), limit)
    generator = torch.Generator().manual_seed(seed)

    def gaussian(rows: int, columns: int) -> Tensor:
        fresh = torch.randn(rows, columns, generator=generator)
        return fresh.to(like).expand(modules, rows, columns)

    X = torch.linalg.qr(gaussian(d_in, block))[0]
    Y = D.apply(torch.cat([X, gaussian(d_in, PROBES)], 2))
    Y, seen = Y[..., :block], Y[..., block:]
    eps = torch.finfo(X.dtype).eps
    scale = Y.norm(dim=(1, 2), keepdim=True) / (block * max(d_out, d_in)) ** 0.5
    noise = gaussian(max(d_out, d_in), block) * scale * eps
    room = min(limit, 4 * (rank + block)) + block
    left, right = (Basis(X.new_empty(modules, room, d), 0) for d in (d_out, d_in))
    space = Subspace(left, right.with_(X), X.new_zeros(modules, block, 0), block)
    halfway: list[Tensor] = []
    past: list[Tensor] = []
    applies = block + PROBES
    while True:
        width = space.width
        space = grow(space, Y, D, noise)
        applies += space.width - width
        X = space.newest
        if space.width >= rank:
            squares = space.squares(space.V.shape[2])
            past = [*past[-2:], squares[:, :rank]]
            if len(past) < 3:  # later on whole steps say as much, and eigenvalues are dear
                halfway += [space.squares(space.V.shape[2] - space.new)[:, :rank]]
            gain = torch.zeros_like(past[-1]) if space.complete else missing(halfway, past)
            rest = seen - space.U @ (space.U.mT @ seen)
            outside = rest.double().square().sum((1, 2)) / PROBES
            estimate = Estimate(past[-1], gain, outside + squares[:, rank:].sum(1), eps)
            if space.complete:
                return triples(space, rank, estimate, applies)
            if estimate.within(tolerance, direction_tolerance):
                applies += PROBES
                unseen = largest_outside(D, space.U, seen + noise[:, :d_out, :PROBES])
                if bool(unseen.le(estimate.weakest).all()):
                    return triples(space, rank, estimate, applies)
                X = torch.linalg.qr(gaussian(d_in, block))[0]
        Y, applies = D.apply(X), applies + X.shape[2]


def grow(space: Subspace, Y: Tensor, D: Operator, noise: Tensor) -> Subspace:
    """`U` extended by `Y`, then `V` by `D^T` of what was new."""
    _, d_out, d_in = D.shape
    Y = Y[..., : min(d_out, d_in) - space.width]
    Q, _ = extend(space.U, Y + noise[:, :d_out, : Y.shape[2]])
    Z = D.apply_t(Q)
    P, C = extend(space.V, Z + noise[:, :d_in, : Z.shape[2]])
    T = torch.nn.functional.pad(space.T, (0, 0, 0, P.shape[2]))
    return Subspace(space.left.with_(Q), space.right.with_(P), torch.cat([T, C], 2), P.shape[2])


def extend(
    basis: Float[Tensor, "modules d l"], Y: Float[Tensor, "modules d k"]
) -> tuple[Float[Tensor, "modules d q"], Float[Tensor, "modules p k"]]:
    """`Q` orthonormal and orthogonal to `basis`, and `C` with `Y = [basis, Q] C`.

    `Q` has as many columns as `Y`, or as many as complete the basis. Where `Y` adds nothing to the
    basis its columns must hold some noise: QR would fill them with columns of the identity.
    """
    first = basis.mT @ Y
    rest = Y - basis @ first
    again = basis.mT @ rest  # "twice is enough" (Kahan) where something new remains
    first, rest = first + again, rest - basis @ again
    Q, _ = torch.linalg.qr(rest[..., : basis.shape[1] - basis.shape[2]])
    close = 10 * torch.finfo(Y.dtype).eps
    for _ in range(3):  # more where nothing does
        slant = basis.mT @ Q
        if not slant.numel() or float(slant.abs().amax()) <= close:
            break
        Q, _ = torch.linalg.qr(Q - basis @ slant)
    return Q, torch.cat([first, Q.mT @ rest], 1)


def largest_outside(D: Operator, U: Tensor, seen: Tensor) -> Tensor:
    """A lower bound of the largest squared singular value of `D - U U^T D`, from probes."""
    Z = D.apply_t(extend(U, seen)[0]).double()
    largest: Tensor = torch.linalg.eigvalsh(Z.mT @ Z)
    return largest[:, -1]


def triples(space: Subspace, rank: int, estimate: Estimate, applies: int) -> Triples:
    """The head of `U U^T D = U (V T)^T`.

    `D v_j` leaves the span of `U` only through the newest block of `V`, taken to act about as
    strongly as it was coupled in.
    """
    P, S, Xh = torch.linalg.svd(space.T, full_matrices=False)
    S = S[:, :rank]
    angle = torch.zeros_like(S)
    if space.new and not space.complete:
        strength = torch.linalg.matrix_norm(space.T[:, -space.new :], 2)
        share = P[:, P.shape[1] - space.new :, :rank].norm(dim=1)
        angle = strength[:, None] * share / S.clamp_min(torch.finfo(S.dtype).tiny)
    U, Vh = space.U @ Xh.mT[..., :rank], (space.V @ P[..., :rank]).mT
    return Triples(U, S, Vh, angle.clamp_max(1), estimate, applies)
