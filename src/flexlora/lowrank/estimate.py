"""How far leading singular triples are from the true ones, estimated without knowing those."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

MISSING = 2.5
"""What a squared singular value still lacks, in squared residuals of the half step before it.

A pair `(u, s, v)` with `D^T u = s v` and `||D v - s u|| = e` has `s^2 + e^2` after half a step more
at least, and lacks about as much again of its true value where a gap follows it, up to 2.6 times as
much where none does (seen on the spectra of the tests and on noisy cohorts near the tolerances).
"""


@dataclass(frozen=True)
class Estimate:
    """What is known of the error of leading singular values, per module, in float64.

    Attributes:
        squares: `(modules, rank)` squared singular values found.
        residual: `(modules, rank)` squared norms of `D v_j - s_j u_j` half a step before.
        tail: `(modules,)` estimate of `||D - D_r||_F^2` for the `D_r` found.
        eps: rounding unit of the arithmetic.
        rounding: `(modules,)` squared Frobenius norm of what `D` was changed by beforehand.
        tilt: `(modules, k)` norm of that change along the last `k` right vectors, relative to their
            singular values.
    """

    squares: Float[Tensor, "modules rank"]
    residual: Float[Tensor, "modules rank"]
    tail: Float[Tensor, " modules"]
    eps: float
    rounding: Float[Tensor, " modules"] | None = None
    tilt: Float[Tensor, "modules k"] | None = None

    @property
    def gain(self) -> Float[Tensor, "modules rank"]:
        """What is missing from each squared singular value."""
        return MISSING * self.residual

    @property
    def excess(self) -> Float[Tensor, " modules"]:
        """Frobenius error over the best at this rank, minus 1; 0 where both are rounding."""
        rounding = (32 * self.eps) ** 2 * self.squares.sum(1)
        changed = 0.0 if self.rounding is None else self.rounding
        best = (self.tail - self.gain.sum(1) - changed).maximum(rounding).clamp_min(1e-300)
        return ((self.tail + changed).maximum(best) / best).sqrt() - 1

    @property
    def sigma_error(self) -> Float[Tensor, "modules rank"]:
        """Relative error of each singular value; 0 for those at rounding level."""
        whole = (self.squares + self.gain).clamp_min(1e-300)
        return torch.where(self.sound, 1 - (self.squares / whole).sqrt() + self.worst_tilt, 0.0)

    @property
    def angle(self) -> Float[Tensor, "modules rank"]:
        """The residuals relative to the singular values, at most 1; 0 at rounding level."""
        share = self.residual / self.squares.clamp_min(1e-300)
        return torch.where(self.sound, (share.sqrt() + self.worst_tilt).clamp_max(1), 0.0)

    @property
    def worst_tilt(self) -> Float[Tensor, "modules 1"] | float:
        """The largest tilt of a singular value above rounding, taken for all."""
        if self.tilt is None:
            return 0.0
        sound = self.sound[:, -self.tilt.shape[1] :]
        return torch.where(sound, self.tilt, 0.0).amax(1, keepdim=True)

    @property
    def sound(self) -> Tensor:
        """Which singular values are above rounding."""
        return self.squares.gt((100 * self.eps) ** 2 * self.squares[:, :1])

    @property
    def weakest(self) -> Float[Tensor, " modules"]:
        """The smallest squared singular value, with what is missing from it, above rounding."""
        rounding = (100 * self.eps) ** 2 * self.squares[:, 0]
        return (self.squares[:, -1] + self.gain[:, -1]).maximum(rounding)

    def within(self, tolerance: float, direction_tolerance: float) -> bool:
        """Whether every module meets both tolerances."""
        fine = self.excess.le(tolerance) & self.sigma_error.amax(1).le(direction_tolerance)
        return bool(fine.all())


@dataclass(frozen=True)
class Triples:
    """Leading singular triples of a batch of matrices; `D v_j = s_j u_j` holds to rounding.

    Attributes:
        U: `(modules, d_out, rank)`, orthonormal columns.
        S: `(modules, rank)`, descending.
        Vh: `(modules, rank, d_in)`, orthonormal rows.
        estimate: of the error.
        applies: rows multiplied with `D` or `D^T`.
    """

    U: Float[Tensor, "modules d_out rank"]
    S: Float[Tensor, "modules rank"]
    Vh: Float[Tensor, "modules rank d_in"]
    estimate: Estimate
    applies: int
