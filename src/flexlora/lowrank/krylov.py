"""Randomized block Krylov iteration: the head of a matrix from products with it alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.lowrank.operators import Operator

PROBES = 8
"""Gaussian columns that measure the energy outside the subspace (seen by nothing else)."""

LARGEST_BLOCK = 64
MAX_RATIO = 0.9


@dataclass(frozen=True)
class Triples:
    """Leading singular triples of a batch of matrices, with what is known of their error.

    Attributes:
        U: `(modules, d_out, rank)`, orthonormal columns.
        S: `(modules, rank)`, descending.
        Vh: `(modules, rank, d_in)`, orthonormal rows.
        tail: `(modules,)` estimate of `||D - U S Vh||_F`.
        gain: `(modules, rank)` estimate of what is missing from each `S^2`.
        angle: `(modules, rank)` estimate of `||D v_j - s_j u_j|| / s_j`; `D^T u_j = s_j v_j` holds.
        applies: columns multiplied with `D` or `D^T`.
    """

    U: Float[Tensor, "modules d_out rank"]
    S: Float[Tensor, "modules rank"]
    Vh: Float[Tensor, "modules rank d_in"]
    tail: Float[Tensor, " modules"]
    gain: Float[Tensor, "modules rank"]
    angle: Float[Tensor, "modules rank"]
    applies: int

    def excess(self) -> Float[Tensor, " modules"]:
        """Estimated `||D - U S Vh||_F / (best possible at this rank) - 1`; 0 at rounding level."""
        tail, gain = self.tail.double() ** 2, self.gain.double().sum(1)
        rounding = (torch.finfo(self.S.dtype).eps * 4) ** 2 * (self.S.double() ** 2).sum(1)
        best = (tail - gain).clamp_min(rounding.clamp_min(1e-300))
        return (tail.maximum(best) / best).sqrt() - 1

    def sigma_error(self) -> Float[Tensor, "modules rank"]:
        """Estimated relative error of each singular value; 0 for those at rounding level."""
        S = self.S.double()
        sound = S.gt(100 * torch.finfo(self.S.dtype).eps * S[:, :1])
        return torch.where(sound, 1 - (1 + self.gain / S.clamp_min(1e-300) ** 2) ** -0.5, 0.0)


def block_size(rank: int) -> int:
    """Columns per step: a third of the rank, a multiple of 8, up to 64.

    Small blocks need fewer products for the same accuracy, large ones run faster; 64 columns reach
    four fifths of the machine's speed.
    """
    return min(LARGEST_BLOCK, max(8, -(-rank // 24) * 8))


def expected_width(rank: int, limit: int) -> int:
    """Columns of the subspace at which a noisy spectrum is usually resolved to 1 %."""
    return min(2 * rank + block_size(rank), limit)


def block_krylov(
    D: Operator,
    rank: int,
    seed: int,
    tolerance: float,
    direction_tolerance: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Triples:
    """The leading `rank` singular triples from products with `D` and `D^T`, to a tolerance.

    Builds an orthonormal basis `U` of `span(D X, (D D^T) D X, ...)` for a Gaussian `X` of
    `block_size(rank)` columns, block by block, and takes the SVD of `U^T D`. The subspace grows
    until both hold: the Frobenius error is within `1 + tolerance` of the best at this rank, and
    each singular value within `direction_tolerance` of its own (a small excess in Frobenius norm
    alone can hide a garbage tail).

    The estimates: subspaces are nested, so each `s_j^2` only grows (Cauchy interlacing); what is
    missing from it is extrapolated from its last two increments as a geometric series. The energy
    outside the subspace is measured on 8 independent Gaussian columns (relative standard deviation
    `sqrt(2 / (8 effective rank of the tail))`).

    Cost: `2 l` columns through `D`, `l` about `2 rank + block` for a flat tail and less for a
    decaying one; orthogonalisation `12 (d_out + d_in) l^2`. Random: the start and the probes, from
    `seed`. Not for ranks near `min(d_out, d_in)`: an exact SVD is cheaper there.

    Source: Musco and Musco, Randomized Block Krylov Methods for Stronger and Faster Approximate
    Singular Value Decomposition, NeurIPS 2015, arXiv 1504.05477, Algorithm 2; Tropp and Webber,
    Randomized algorithms for low-rank matrix approximation, 2023, arXiv 2306.12418 (there with
    error estimates of another kind). Ours keeps the coefficients of the orthogonalisation, so that
    the small SVD needs no further product.
    """
    modules, d_out, d_in = D.shape
    limit = min(d_out, d_in)
    generator = torch.Generator().manual_seed(seed)

    def gaussian(rows: int, columns: int) -> Tensor:
        fresh = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        return fresh.to(device=device, dtype=dtype).expand(modules, rows, columns)

    block = min(block_size(rank), limit)
    V = torch.linalg.qr(gaussian(d_in, block))[0]
    Y = D.apply(torch.cat([V, gaussian(d_in, PROBES)], 2))
    Y, seen = Y[..., :block], Y[..., block:]
    rounding = Y.norm(dim=(1, 2), keepdim=True) * torch.finfo(dtype).eps / (block * d_in) ** 0.5
    U, T = V.new_zeros(modules, d_out, 0), V.new_zeros(modules, block, 0)
    past: list[Tensor] = []  # squared singular values at the last steps
    applies = block + PROBES
    while True:
        Y = Y[..., : limit - U.shape[2]]
        Q, _ = extend(U, Y + rounding * gaussian(d_out, Y.shape[2]))
        U = torch.cat([U, Q], 2)
        Z = D.apply_t(Q)
        P, C = extend(V, Z + rounding * gaussian(d_in, Z.shape[2]))
        T = torch.cat([torch.nn.functional.pad(T, (0, 0, 0, P.shape[2])), C], 2)
        V, applies = torch.cat([V, P], 2), applies + Q.shape[2]
        full = U.shape[2] == limit
        if U.shape[2] >= rank:
            past = [*past[-2:], torch.linalg.svdvals(T.double())[:, :rank] ** 2]
            if full or len(past) > 1:
                outside = outside_energy(U, seen)
                gain = torch.zeros_like(past[-1]) if full else missing(past)
                coupling = C[:, C.shape[1] - P.shape[2] :] * (not full)
                found = assemble(U, T, V, rank, coupling, outside, gain, applies)
                fine = (found.excess() <= tolerance) & (
                    found.sigma_error().amax(1) <= direction_tolerance
                )
                if full or bool(fine.all()):
                    return found
        Y, applies = D.apply(P), applies + P.shape[2]


def extend(
    basis: Float[Tensor, "modules d l"], Y: Float[Tensor, "modules d k"]
) -> tuple[Float[Tensor, "modules d q"], Float[Tensor, "modules p k"]]:
    """`Q` orthonormal and orthogonal to `basis`, and `C` with `Y = [basis, Q] C`.

    `Q` has as many columns as `Y`, or as many as complete the basis. Where `Y` adds nothing to the
    basis its columns must hold some noise: QR would fill them with columns of the identity.
    """
    first = basis.mT @ Y
    rest = Y - basis @ first
    width = min(Y.shape[2], basis.shape[1] - basis.shape[2])
    Q, _ = torch.linalg.qr(rest[..., :width])
    Q, _ = torch.linalg.qr(Q - basis @ (basis.mT @ Q))  # twice is enough (Kahan)
    return Q, torch.cat([first + basis.mT @ rest, Q.mT @ rest], 1)


def missing(past: list[Tensor]) -> Tensor:
    """What is missing from each squared singular value, from its last increments."""
    last = (past[-1] - past[-2]).clamp_min(0)
    if len(past) < 3:
        return last
    before = (past[-2] - past[-3]).clamp_min(torch.finfo(last.dtype).tiny)
    ratio = (last / before).clamp(0, MAX_RATIO)
    return last * ratio / (1 - ratio)


def outside_energy(U: Tensor, seen: Tensor) -> Tensor:
    """Estimate of `||D - U U^T D||_F^2` from `seen = D G`, `G` Gaussian and independent of `U`."""
    rest = seen - U @ (U.mT @ seen)
    return rest.double().square().sum((1, 2)) / seen.shape[2]


def assemble(
    U: Tensor,
    T: Tensor,
    V: Tensor,
    rank: int,
    coupling: Tensor,
    outside: Tensor,
    gain: Tensor,
    applies: int,
) -> Triples:
    """Singular triples of `U U^T D = U (V T)^T`, truncated, with their error estimates.

    `D v_j` leaves the span of `U` only through the newest block of `V`, taken to act about as
    strongly as it was coupled in: by its own factor of the orthogonalisation.
    """
    P, S, Xh = torch.linalg.svd(T, full_matrices=False)
    inside = (S[:, rank:].double() ** 2).sum(1)
    newest = P[:, P.shape[1] - coupling.shape[1] :, :rank].norm(dim=1)
    strength = torch.linalg.svdvals(coupling).amax(1) if coupling.numel() else S[:, 0] * 0
    S = S[:, :rank]
    angle = strength[:, None] * newest / S.clamp_min(torch.finfo(S.dtype).tiny)
    left, right = U @ Xh.mT[..., :rank], (V @ P[..., :rank]).mT
    return Triples(left, S, right, (outside + inside).sqrt(), gain, angle.clamp_max(1), applies)
