"""How far leading singular triples are from the true ones, estimated without knowing those."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST_RATIO = 0.9

SAFETY = 2.0
"""On what is estimated to be missing: spectra whose first steps mislead are underestimated."""


@dataclass(frozen=True)
class Estimate:
    """What is known of the error of leading singular values, per module, in float64.

    Attributes:
        squares: `(modules, rank)` squared singular values found.
        gain: `(modules, rank)` estimate of what is missing from each.
        tail: `(modules,)` estimate of `||D - D_r||_F^2` for the `D_r` found.
        eps: rounding unit of the arithmetic.
    """

    squares: Float[Tensor, "modules rank"]
    gain: Float[Tensor, "modules rank"]
    tail: Float[Tensor, " modules"]
    eps: float

    @property
    def excess(self) -> Float[Tensor, " modules"]:
        """Frobenius error over the best at this rank, minus 1; 0 where both are rounding."""
        rounding = (32 * self.eps) ** 2 * self.squares.sum(1)
        best = (self.tail - self.gain.sum(1)).maximum(rounding).clamp_min(1e-300)
        return (self.tail.maximum(best) / best).sqrt() - 1

    @property
    def sigma_error(self) -> Float[Tensor, "modules rank"]:
        """Relative error of each singular value; 0 for those at rounding level."""
        sound = self.squares.gt((100 * self.eps) ** 2 * self.squares[:, :1])
        whole = (self.squares + self.gain).clamp_min(1e-300)
        return torch.where(sound, 1 - (self.squares / whole).sqrt(), 0.0)

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
    """Leading singular triples of a batch of matrices.

    Attributes:
        U: `(modules, d_out, rank)`, orthonormal columns.
        S: `(modules, rank)`, descending.
        Vh: `(modules, rank, d_in)`, orthonormal rows.
        angle: `(modules, rank)` estimate of `||D v_j - s_j u_j|| / s_j`; `D^T u_j = s_j v_j` holds.
        estimate: of the error.
        applies: columns multiplied with `D` or `D^T`.
    """

    U: Float[Tensor, "modules d_out rank"]
    S: Float[Tensor, "modules rank"]
    Vh: Float[Tensor, "modules rank d_in"]
    angle: Float[Tensor, "modules rank"]
    estimate: Estimate
    applies: int


def missing(halfway: list[Tensor], past: list[Tensor]) -> Tensor:
    """What is missing from each squared singular value, from the last increments.

    `past` are the values after each step, up to three; `halfway` those half a step before the first
    two. The rate of convergence is that of the last two increments, or, after only two steps, the
    square of the last increment over that half a step before. One rate for all of a module, of the
    sums of relative increments: single ones are too noisy.
    """
    if len(past) < 2:
        return torch.full_like(past[-1], torch.inf)
    size = past[-1].clamp_min(1e-300)
    earlier = past[:2] if len(past) > 2 else halfway
    last, before = ((new - old).clamp_min(0) for old, new in (past[-2:], earlier))
    rate = (last / size).sum(1, keepdim=True)
    rate = rate / (before / size).sum(1, keepdim=True).clamp_min(1e-300)
    rate = (rate if len(past) > 2 else rate.square()).clamp(0, LARGEST_RATIO)
    return SAFETY * last * rate / (1 - rate)
