"""A running weighted sum of products in fixed memory, read once: three linear sketches."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.lowrank.decompose import as_product
from flexlora.lowrank.product import LowRank

ERROR_ROWS = 10
"""Rows of the sketch that measures the error."""


@dataclass(frozen=True)
class RunningSum:
    """Linear sketches of `D = sum_k w_k D_k`, updated as products arrive; nothing else is kept.

    `X = Upsilon D (k, d_in)`, `Y = D Omega (d_out, k)`, the core `Z = Phi D Psi (s, s)` and `E =
    Theta D (10, d_in)`, with Gaussian test matrices. All are linear in `D`: sums of two servers add
    up (`one + other`), in any order or tree, to rounding. For cohorts too large to spool; where the
    updates can be read twice, :func:`~flexlora.lowrank.decompose` is much closer to the best.

    Source: Tropp, Yurtsever, Udell, Cevher: Practical sketching algorithms for low-rank matrix
    approximation, SIAM J. Matrix Anal. Appl. 38(4), 2017, arXiv 1609.00048; the core sketch and the
    error sketch: the same, Streaming low-rank matrix approximation with an application to
    scientific simulation, SIAM J. Sci. Comput. 41(4), 2019, arXiv 1902.08651, Sections 2 and 6.

    Attributes:
        shape: `(d_out, d_in)`.
        seed: of the test matrices; only sketches of one seed add up.
        weight: sum of the weights so far.
        X: co-range sketch.
        Y: range sketch.
        Z: core sketch.
        E: error sketch.

    >>> import torch
    >>> d = LowRank(torch.eye(40)[:, :3], torch.eye(3, 50), 2.0)
    >>> one = running_sum((40, 50), rank=3).add(d, weight=0.25)
    >>> other = running_sum((40, 50), rank=3).add(d, weight=0.75)
    >>> found = (one + other).read(3)
    >>> torch.allclose(found.product.dense(), d.dense(), atol=1e-4)
    True
    """

    shape: tuple[int, int]
    seed: int
    weight: float
    X: Float[Tensor, "k d_in"]
    Y: Float[Tensor, "d_out k"]
    Z: Float[Tensor, "s s"]
    E: Float[Tensor, "q d_in"]

    def add(self, term: LowRank, weight: float) -> RunningSum:
        """`self + weight * term`, `2 r (k + s) (d_out + d_in)` FLOPs.

        Raises:
            ValueError: another shape, or numbers that are not finite.
        """
        if term.shape != self.shape:
            raise ValueError(f"RunningSum: a term of shape {term.shape}; expected {self.shape}.")
        B = term.B.to(self.Y.dtype) * (weight * term.scaling)
        A = term.A.to(self.Y.dtype)
        if not (bool(B.isfinite().all()) and bool(A.isfinite().all())):
            raise ValueError("RunningSum: a term holds NaN or infinite numbers; refuse the update.")
        t = _tests(self)
        return replace(
            self,
            weight=self.weight + weight,
            X=self.X + (t.upsilon @ B) @ A,
            Y=self.Y + B @ (A @ t.omega),
            Z=self.Z + (t.phi @ B) @ (A @ t.psi),
            E=self.E + (t.theta @ B) @ A,
        )

    def __add__(self, other: RunningSum) -> RunningSum:
        """The sum of both: partial sums of several servers.

        Raises:
            ValueError: sketches of different shapes, sizes or seeds.
        """
        if (self.shape, self.seed, self.X.shape) != (other.shape, other.seed, other.X.shape):
            raise ValueError(
                f"RunningSum: cannot add shape {other.shape}, seed {other.seed}, size "
                f"{other.X.shape[0]} to {self.shape}, {self.seed}, {self.X.shape[0]}; both must "
                "come from running_sum(...) with the same arguments."
            )
        return replace(
            self,
            weight=self.weight + other.weight,
            X=self.X + other.X,
            Y=self.Y + other.Y,
            Z=self.Z + other.Z,
            E=self.E + other.E,
        )

    def read(self, rank: int) -> Sketched:
        """The rank-`rank` approximation of what was added, and how good it is.

        `Q = orth(Y)`, `P = orth(X^T)`, `C = (Phi Q)^+ Z ((Psi^T P)^+)^T`, `D ~ Q trunc_r(C) P^T`
        (2019, equations 2.7 to 2.11). The weights are as added: divide by `weight` for a mean.

        Raises:
            ValueError: a rank above the one it was made for.
        """
        k = self.X.shape[0]
        if not 1 <= rank <= k:
            raise ValueError(
                f"RunningSum: rank {rank}; expected 1 to {k}, and best up to {k // 2}."
            )
        t = _tests(self)
        scale = float(self.Y.abs().amax()) or 1.0
        Q, P = torch.linalg.qr(self.Y / scale)[0], torch.linalg.qr(self.X.T / scale)[0]
        half = torch.linalg.lstsq(t.phi @ Q, self.Z / scale).solution
        core = torch.linalg.lstsq(t.psi.T @ P, half.T).solution.T
        U, S, Vh = torch.linalg.svd(core)
        left, right = Q @ U, Vh @ P.T
        whole = _error(self, t, (left * S) * scale, right)
        product = as_product(left[:, :rank], S[:rank], right[:rank], scale, rank, self.seed)
        error = _error(self, t, product.B, product.A)
        best = float((S[rank:] * scale).norm()) - whole
        excess = max(error / best - 1, 0.0) if best > 0 else float("inf")
        norm = float(self.E.double().norm()) / math.sqrt(ERROR_ROWS)
        return Sketched(product, error, norm, 0.0 if error <= 1e-6 * norm else excess)


@dataclass(frozen=True)
class Sketched:
    """What a sketch tells.

    Attributes:
        product: rank-r approximation in SVD form.
        error: unbiased estimate of `||D - product||_F` (its square is), 10 degrees of freedom per
            direction of the error.
        norm: the same of `||D||_F`.
        excess: estimated bound on `error` over the best at this rank, minus 1: by Mirsky's
            inequality the best error is at least the tail of the unrounded reconstruction minus its
            own error. Infinite where that says nothing.
    """

    product: LowRank
    error: float
    norm: float
    excess: float


def running_sum(
    shape: tuple[int, int], rank: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> RunningSum:
    """An empty sum from which ranks up to `rank` are to be read.

    Sketch sizes `k = 2 rank + 1` and `s = 2 k + 1` (the sources' choice for a flat tail), cut at
    the matrix's own size: `k (d_out + d_in) + s^2` numbers.
    """
    d_out, d_in = shape
    k = min(2 * rank + 1, d_out, d_in)
    s = min(2 * k + 1, d_out, d_in)
    return RunningSum(
        shape,
        seed,
        0.0,
        torch.zeros(k, d_in, dtype=dtype),
        torch.zeros(d_out, k, dtype=dtype),
        torch.zeros(s, s, dtype=dtype),
        torch.zeros(ERROR_ROWS, d_in, dtype=dtype),
    )


@dataclass(frozen=True)
class _TestMatrices:
    upsilon: Tensor
    omega: Tensor
    phi: Tensor
    psi: Tensor
    theta: Tensor


def _tests(total: RunningSum) -> _TestMatrices:
    return _draw(total.shape, total.X.shape[0], total.Z.shape[0], total.seed, total.Y.dtype)


@functools.lru_cache(maxsize=8)
def _draw(shape: tuple[int, int], k: int, s: int, seed: int, dtype: torch.dtype) -> _TestMatrices:
    """The same for every module and server of one shape and seed, so drawn once."""
    d_out, d_in = shape
    g = torch.Generator().manual_seed(seed)

    def gaussian(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=g).to(dtype)

    return _TestMatrices(
        gaussian(k, d_out),
        gaussian(d_in, k),
        gaussian(s, d_out),
        gaussian(d_in, s),
        gaussian(ERROR_ROWS, d_out),
    )


def _error(total: RunningSum, t: _TestMatrices, B: Tensor, A: Tensor) -> float:
    """`||Theta (D - B A)||_F / sqrt(10)`: its square estimates `||D - B A||_F^2` without bias."""
    rest = total.E.double() - ((t.theta @ B) @ A).double()
    return float(rest.norm()) / math.sqrt(ERROR_ROWS)
