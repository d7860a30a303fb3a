"""Randomized block Krylov iteration: the head of a matrix from products with it alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.lowrank.basis import Basis, extend, orthonormal, small_svd
from flexlora.lowrank.estimate import Estimate, Triples, decay
from flexlora.lowrank.operators import Operator

PROBES = 8
"""Gaussian rows that measure the energy outside the subspace (seen by nothing else)."""

SMALLEST_BLOCK = 16


def block_size(rank: int) -> int:
    """Rows per step: a third of the rank, a multiple of 8, 16 or more.

    Small blocks need fewer products for the same accuracy, large ones run faster.
    """
    return max(SMALLEST_BLOCK, rank // 24 * 8)


def expected_width(rank: int, power_steps: int, limit: int) -> int:
    """Rows of the subspace at which a noisy spectrum is usually resolved to 1 %.

    8 / 3 of the rank, less a third, about a block, for each power step.
    """
    return min(max((8 - power_steps) * rank // 3, block_size(rank)), limit)


@dataclass(frozen=True)
class Subspace:
    """Orthonormal rows `U` and `V` grown in turn, and what `D` does between them.

    To rounding `V D^T = M U`, except for the rows of `V` that `D` has not been applied to yet, and
    `U D = T V`, except for those of `U`.

    Attributes:
        left: `U`, `(modules, u, d_out)`.
        right: `V`, `(modules, v, d_in)`.
        M: `(modules, v, u)`.
        T: `(modules, u, v)`.
    """

    left: Basis
    right: Basis
    M: Float[Tensor, "modules v u"]
    T: Float[Tensor, "modules u v"]

    @property
    def U(self) -> Float[Tensor, "modules u d_out"]:
        """The rows of `left`."""
        return self.left.rows

    @property
    def V(self) -> Float[Tensor, "modules v d_in"]:
        """The rows of `right`."""
        return self.right.rows

    def applied(self, Y: Tensor) -> Subspace:
        """With `Y = X D^T` for the rows `X` of `V` that are new."""
        Q, C = extend(self.U, Y)
        return Subspace(self.left.with_(Q), self.right, below(self.M, C), self.T)

    def applied_t(self, Z: Tensor) -> Subspace:
        """With `Z = X D` for the rows `X` of `U` that are new."""
        P, C = extend(self.V, Z)
        return Subspace(self.left, self.right.with_(P), self.M, below(self.T, C))

    def restarted(self, Y: Tensor) -> Subspace:
        """With rows in `U` that come from elsewhere."""
        Q, _ = extend(self.U, Y)
        M = torch.nn.functional.pad(self.M, (0, Q.shape[1]))
        return Subspace(self.left.with_(Q), self.right, M, self.T)

    @property
    def new(self) -> Float[Tensor, "modules new d_in"]:
        """The rows of `V` that `D` has not been applied to."""
        return self.V[:, self.M.shape[1] :]

    @property
    def new_t(self) -> Float[Tensor, "modules new d_out"]:
        """The rows of `U` that `D^T` has not been applied to."""
        return self.U[:, self.T.shape[1] :]


def below(M: Tensor, C: Tensor) -> Tensor:
    """`M` with zero columns to the width of `C`, and `C` below it."""
    return torch.cat([torch.nn.functional.pad(M, (0, C.shape[2] - M.shape[2])), C], 1)


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
    `span(X, (D^T D) X, ...)`, block by block in turn, and takes the SVD of `U D`. `X` are
    `block_size(rank)` Gaussian rows after `D.power_steps` steps of `D^T D`: on a noisy spectrum a
    step finds what a block would for as many products, and leaves the subspaces a block narrower.
    They grow until both hold: the Frobenius error is within `1 + tolerance` of the best at this
    rank, and each singular value within `direction_tolerance` of its own (a small excess in
    Frobenius norm alone can hide a garbage tail).

    The estimates: once `D^T` is applied to all of `U`, the residual `||D^T u_j - s_j v_j||` of each
    pair found in the half step before is known exactly, from the coefficients alone, and what is
    missing from each value follows from it and its decay
    (:class:`~flexlora.lowrank.estimate.Estimate`). The energy outside the subspace is measured on 8
    independent Gaussian rows (relative standard deviation `sqrt(2 / (8 effective rank of the
    tail))`). Before the end these also look for a direction outside that belongs inside: Krylov
    spaces see a value repeated more often than their block is wide only in part, and their
    residuals cannot tell.

    Cost: `2 (l + p b)` rows through `D`, `b` the block, `p` the power steps and `l` about twice the
    rank (less for a steep spectrum, more for a flat one); orthogonalisation
    `2 (d_out + d_in) l^2` FLOPs or up to twice as many. Random: the start and the probes, from
    `seed`. Not for ranks near `min(d_out, d_in)`: an exact SVD is cheaper there.

    Source: Musco and Musco, Randomized Block Krylov Methods for Stronger and Faster Approximate
    Singular Value Decomposition, NeurIPS 2015, arXiv 1504.05477, Algorithm 2; Tropp and Webber,
    Randomized algorithms for low-rank matrix approximation, 2023, arXiv 2306.12418. Ours keeps
    the coefficients of the orthogonalisation, so that the small SVD needs no further product, stops
    by the estimates above, and begins as subspace iteration (Halko, Martinsson and Tropp 2011,
    Algorithm 4.4, orthonormalised once a step). A start from the average of the clients' `A` was
    tried: the head is found at once, but the cohort's noise, which fills the rest, takes as many
    products.
    """
    modules, d_out, d_in = D.shape
    generator = torch.Generator().manual_seed(seed)

    def gaussian(rows: int, columns: int) -> Tensor:
        fresh = torch.randn(rows, columns, generator=generator)
        return fresh.to(like).expand(modules, rows, columns)

    block = min(block_size(rank), d_out, d_in)
    X = powered(D, gaussian(block, d_in))
    Y = D.apply(torch.cat([X, gaussian(PROBES, d_in)], 1))
    space, seen = start(X, d_out, 3 * (rank + block)).applied(Y[:, :-PROBES]), Y[:, -PROBES:]
    applies, estimate = 2 * D.power_steps * block + Y.shape[1], None
    while True:
        before, Y = space, space.new_t
        space = space.applied_t(D.apply_t(Y))
        applies += Y.shape[1]
        if before.right.full or space.left.full:
            return triples(space, rank, applies)
        fresh = None
        if before.right.width >= rank:
            missed = seen - (seen @ space.U.mT) @ space.U
            outside = missed.double().square().sum((1, 2)) / PROBES
            estimate, span = judge(before, space, outside, rank, estimate)
            if estimate.within(tolerance, direction_tolerance):
                applies += PROBES
                W, _ = extend(space.U, missed)
                if not bool(strongest(D.apply_t(W)).le(estimate.weakest).all()):
                    fresh = gaussian(block, d_out)
                else:
                    found = triples(space, rank, applies, outside, estimate, span)
                    if found.estimate.within(tolerance, direction_tolerance):
                        return found
        X = space.new
        space = space.applied(D.apply(X))
        space = space if fresh is None else space.restarted(fresh)
        applies += X.shape[1]


def powered(D: Operator, X: Tensor) -> Float[Tensor, "modules block d_in"]:
    """Orthonormal rows that span `X (D^T D)^p`, for its `p` power steps."""
    for _ in range(D.power_steps):
        X = D.apply_t(D.apply(orthonormal(X)[0]))
    return extend(X[:, :0], X)[0]  # in as many passes as such graded rows take


def start(X: Float[Tensor, "modules block d_in"], d_out: int, room: int) -> Subspace:
    """Nothing but the first rows of `V`."""
    modules, _, d_in = X.shape
    left, right = (X.new_empty(modules, min(room, d), d) for d in (d_out, d_in))
    none = X.new_zeros(modules, 0, 0)
    return Subspace(Basis(left, 0), Basis(right, 0).with_(X), none, none)


def judge(
    before: Subspace,
    space: Subspace,
    outside: Float[Tensor, " modules"],
    rank: int,
    earlier: Estimate | None,
) -> tuple[Estimate, Float[Tensor, "modules v span"]]:
    """How good the leading pairs of `before` are in `space`, and a span in `V` that holds them.

    The pairs are those of `V D^T = M U`: `D^T u_j` leaves the span of `V` only through the rows of
    `U` that `D^T` had not been applied to, into the rows that `V` has gained since. The span is
    that of these rows, of the first `rank` pairs and of as many beyond them: the others hardly
    matter to the head (as in the thick restart of Lanczos methods). `outside` is the energy that
    `U` of `space` misses, `earlier` the estimate of the step before. No product with `D`.
    """
    known, width = before.T.shape[1], before.right.width
    M, R = before.M.double(), space.T[:, known:, width:].double()
    gained, dtype = R.shape[2], space.M.dtype
    pairs, S = small_svd(M, min(width, rank + gained), dtype)
    left = M[:, :, known:].mT @ pairs[..., :rank] / above_rounding(S[:, :rank], dtype)
    residual = (R.mT @ left).square().sum(1)
    found = S[:, :rank].square() + residual
    inside = M.square().sum((1, 2)) + R.square().sum((1, 2)) - found.sum(1)
    tail = outside + inside.clamp_min(0)
    span = torch.nn.functional.pad(pairs, (0, gained, 0, gained))
    span[:, width:, pairs.shape[2] :] = torch.eye(gained, dtype=span.dtype, device=span.device)
    rate = decay(residual, found, earlier)
    return Estimate(found, residual, rate, tail, torch.finfo(dtype).eps), span


def above_rounding(S: Tensor, dtype: torch.dtype) -> Float[Tensor, "modules 1 rank"]:
    """Singular values to divide by: those near rounding belong to vectors that are not used."""
    return S[:, None].clamp_min(1e-300).maximum(torch.finfo(dtype).eps * S[:, None, :1])


def strongest(Y: Tensor) -> Tensor:
    """The largest squared singular value of a few rows."""
    wide = Y.double()
    squares: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)
    return squares[:, -1]


def triples(
    space: Subspace,
    rank: int,
    applies: int,
    outside: Float[Tensor, " modules"] | float = 0.0,
    estimate: Estimate | None = None,
    span: Float[Tensor, "modules v span"] | None = None,
) -> Triples:
    """The head of `U^T U D = U^T T V`: in a span, or with no estimate all of it, which is `D`'s."""
    T, dtype = space.T.double(), space.T.dtype
    N = T if span is None else T @ span
    X, S = small_svd(N.mT, rank, dtype)
    left, right = N @ X / above_rounding(S, dtype), X if span is None else span @ X
    U, Vh = space.U.mT @ left.to(dtype), right.mT.to(dtype) @ space.V
    squares = S.square()
    tail = outside + (T.square().sum((1, 2)) - squares.sum(1)).clamp_min(0)
    if estimate is None:
        none = torch.zeros_like(squares)
        estimate = Estimate(squares, none, none[:, 0], tail, torch.finfo(dtype).eps)
    else:
        estimate = replace(estimate, squares=squares, tail=tail)
    return Triples(U, S.to(dtype), Vh, estimate, applies)
