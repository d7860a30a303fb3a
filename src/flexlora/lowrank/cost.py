"""Which factorisation is cheapest, from shapes and ranks alone: the one decision, written down."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from flexlora.lowrank.krylov import PROBES, block_size, expected_width
from flexlora.lowrank.operators import DenseMatrix, Sum
from flexlora.lowrank.rounded import HEAD

Path = Literal["core", "gram", "dense", "dense-krylov", "krylov"]
"""The ways to factorise a weighted sum of products.

- `core`: thin QR of the stacked factors, SVD of the `(R, R)` core; exact.
- `gram`: the dense sum, eigenvectors of its smaller Gram matrix in float64; exact in float32.
- `dense`: the dense sum and a full SVD; exact.
- `dense-krylov`: the dense sum, then block Krylov iteration on it; to a tolerance.
- `krylov`: block Krylov iteration on the terms, the sum never formed; to a tolerance.
"""

EXACT: tuple[Path, ...] = ("core", "gram", "dense")


@dataclass(frozen=True)
class Cost:
    """Work of one factorisation of one module.

    Attributes:
        gemm: FLOPs in matrix products.
        columns: the narrow side of those products.
        factor: FLOPs in QR, SVD and eigenvalue routines.
        size: of the matrices they run on.
        bytes: memory moved beyond what the products reuse.
        calls: library calls, for modules so small that only these count.
        fast: FLOPs in products whose factors may be rounded to bfloat16.
    """

    gemm: float
    columns: float
    factor: float
    size: float
    bytes: float
    calls: float
    fast: float = 0.0

    @property
    def seconds(self) -> float:
        """Estimated on the machine the rates were measured on; only their ratios matter."""
        return (
            (self.gemm + self.fast / FAST) * (1 + HALF_COLUMNS / self.columns) / GEMM_RATE
            + self.factor * (1 + HALF_SIZE / self.size) / FACTOR_RATE
            + self.bytes / MEMORY_RATE
            + self.calls * CALL
        )


GEMM_RATE, FACTOR_RATE, MEMORY_RATE, CALL = 180e9, 150e9, 6e9, 30e-6
"""FLOP/s, FLOP/s, bytes/s, seconds: float32, MKL on two cores of an AMD EPYC, November 2026."""

FAST = 2.2
"""How much faster a sum is formed on bfloat16 matrix units: on two cores with AMX."""

HALF_COLUMNS, HALF_SIZE = 25, 500
"""Products this narrow, and factorisations this small, run at half those rates: a Xeon with AMX."""


def cost(
    path: Path,
    shape: tuple[int, int],
    terms: int,
    total_rank: int,
    rank: int,
    itemsize: int = 4,
    fast: bool = False,
) -> Cost:
    """The work of one path.

    With `m, n = d_out, d_in`, `k = min(m, n)`, `R = sum r_k`, the rank `r` wanted, and `l`, `b` the
    width of the Krylov subspace and of its blocks, `p` its power steps, `c = 2 (l + p b + 8)` rows
    multiplied (`t` stands for `(m + n) (4 l^2 + 2 l r)`, orthogonalisation and result; float64
    counts twice):

    | path | products | factorisations |
    |---|---|---|
    | core | `2 R^3 + 2 (m + n) R r` | QR `4 (m + n) R^2`, SVD `22 R^3` |
    | gram | `2 m n (R + 2 k + r) + 2 (m + n) r^2` | eigenvectors `18 k^3`, SVD `22 r^3` |
    | dense | `2 m n R` | SVD `22 k^3 + 4 (m n - k^2) k` |
    | dense-krylov | `2 m n (R + c) + t` | Cholesky `6 (m + n) l b`, eigenvectors `25 l^3` |
    | krylov | `2 R (m + n) c + t` | the same |

    Args:
        path: which.
        shape: `(d_out, d_in)`.
        terms: products in the sum.
        total_rank: `R`.
        rank: `r`.
        itemsize: bytes per number of the arithmetic.
        fast: whether the sum of `dense-krylov` is formed with factors rounded to bfloat16, all but
            their first 8 rows, which 16 rows more through both measure.
    """
    (m, n), R, r = shape, total_rank, rank
    k = min(m, n)
    form, read = 2.0 * m * n * R, float(itemsize * R * (m + n))
    if path == "core":
        gemm, factor = 2.0 * R**3 + 2.0 * (m + n) * R * r, 4.0 * (m + n) * R**2 + 22.0 * R**3
        return Cost(gemm, R, factor, R, 3 * read, 10 + terms)
    written = 2.0 * itemsize * m * n
    if path == "gram":
        gemm = form + 4.0 * m * n * k + 2.0 * m * n * r + 2.0 * (m + n) * r**2
        return Cost(gemm, 128, 18.0 * k**3 + 22.0 * r**3, k, 2 * written, 10 + terms)
    if path == "dense":
        return Cost(form, 128, 22.0 * k**3 + 4.0 * (m * n - k * k) * k, k, written, 2 + terms)
    b, power = block_size(r), (DenseMatrix if path == "dense-krylov" else Sum).power_steps
    width = expected_width(r, power, min(k, R))
    steps, columns = power - (-width // b), 2 * (width + power * b + PROBES)
    tidy = (m + n) * (4.0 * width**2 + 2.0 * width * r)
    factor = 6.0 * (m + n) * width * b + 25.0 * width**3
    if path == "dense-krylov":
        gemm, moved = 2.0 * m * n * columns + tidy, written * (1 + steps / 4)
        whole = Cost(gemm + form, 128, factor, width, moved, 30 * steps + terms)
        if not fast:
            return whole
        head = 2.0 * m * n * min(HEAD * terms, R)
        gemm += head + 32.0 * (R * (m + n) + m * n)
        return replace(whole, gemm=gemm, bytes=moved + read, fast=form - head)
    gemm, moved = 2.0 * R * (m + n) * columns + tidy, read * (1 + steps / 4)
    return Cost(gemm, b, factor, width, moved, steps * (30 + terms / 2))


def choose(
    shape: tuple[int, int],
    terms: int,
    total_rank: int,
    rank: int,
    itemsize: int = 4,
    exact: bool = False,
    fast: bool = False,
) -> Path:
    """The cheapest path by :func:`cost`; `exact` leaves only those without a tolerance.

    >>> choose((2048, 2048), 80, 13192, 200), choose((2048, 2048), 1, 8, 8)
    ('dense-krylov', 'core')
    """
    paths = [
        p for p in get_args(Path) if (p in EXACT or not exact) and (p != "gram" or itemsize == 4)
    ]
    return min(paths, key=lambda p: cost(p, shape, terms, total_rank, rank, itemsize, fast).seconds)
