"""Which factorisation is cheapest, from shapes and ranks alone: the one decision, written down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from flexlora.lowrank.krylov import PROBES, block_size, expected_width

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
        factor: FLOPs in QR, SVD and eigenvalue routines.
        bytes: memory moved beyond what the products reuse.
        calls: library calls, for modules so small that only these count.
    """

    gemm: float
    factor: float
    bytes: float
    calls: float

    @property
    def seconds(self) -> float:
        """On the machine the rates were measured on; only their ratio matters for the choice."""
        return (
            self.gemm / GEMM_RATE
            + self.factor / FACTOR_RATE
            + self.bytes / MEMORY_RATE
            + self.calls * CALL
        )


GEMM_RATE, FACTOR_RATE, MEMORY_RATE, CALL = 150e9, 80e9, 6e9, 30e-6
"""FLOP/s, FLOP/s, bytes/s, seconds: float32, two cores of an AMD EPYC (2026), MKL."""


def cost(
    path: Path, shape: tuple[int, int], terms: int, total_rank: int, rank: int, itemsize: int = 4
) -> Cost:
    """The work of one path.

    Args:
        path: which.
        shape: `(d_out, d_in)`.
        terms: products in the sum.
        total_rank: `R = sum r_k`.
        rank: `r`, wanted.
        itemsize: bytes per number of the arithmetic.

    With `m, n = shape`, `k = min(m, n)` and the subspace width `l`:

    | path | products | factorisations |
    |---|---|---|
    | core | `2 R^3 + 2 (m + n) R r` | QR `4 (m + n) R^2`, SVD `22 R^3` |
    | gram | `2 m n R + 4 m n k + 2 m n r + 2 (m + n) r^2` | eigh `9 k^3` in float64 (twice), QR `4 max r^2` |
    | dense | `2 m n R` | SVD `22 k^3 + 4 (m n - k^2) k` |
    | dense-krylov | `2 m n R + 4 m n l`, orthogonalisation | QR `8 (m + n) l b`, SVD `22 l^3` |
    | krylov | `4 R (m + n) l`, orthogonalisation | the same |
    """
    (m, n), R, r = shape, total_rank, rank
    k = min(m, n)
    form, moved = 2.0 * m * n * R, float(itemsize * (m * n + R * (m + n)))
    if path == "core":
        work = 2.0 * R**3 + 2.0 * (m + n) * R * r
        read = 3.0 * itemsize * R * (m + n)
        return Cost(work, 4.0 * (m + n) * R**2 + 22.0 * R**3, read, 10 + terms)
    if path == "gram":
        factor = 2 * 9.0 * k**3 + 4.0 * max(m, n) * r**2 + 22.0 * r**3
        return Cost(
            form + 4.0 * m * n * k + 2.0 * m * n * r + 2.0 * (m + n) * r**2,
            factor,
            4 * moved,
            10 + terms,
        )
    if path == "dense":
        return Cost(form, 22.0 * k**3 + 4.0 * (m * n - k * k) * k, 2 * moved, 2 + terms)
    b, width = block_size(r), expected_width(r, k)
    steps = -(-width // b)
    tidy = 6.0 * (m + n) * width**2 + 2.0 * (m + n) * width * r
    factor = 8.0 * (m + n) * width * b + 4 * 6.0 * width**3 + 22.0 * width**3
    columns = 2 * width + PROBES
    if path == "dense-krylov":
        passes = itemsize * 2.0 * steps * m * n
        return Cost(form + 2.0 * m * n * columns + tidy, factor, moved + passes, 30 * steps + terms)
    passes = itemsize * 2.0 * steps * R * (m + n) / 4  # read by products that reuse it 64 times
    return Cost(2.0 * R * (m + n) * columns + tidy, factor, passes, steps * (30 + 4 * terms))


def choose(
    shape: tuple[int, int],
    terms: int,
    total_rank: int,
    rank: int,
    itemsize: int = 4,
    exact: bool = False,
) -> Path:
    """The cheapest path by :func:`cost`; `exact` leaves only those without a tolerance.

    >>> choose((2048, 2048), 80, 13192, 200), choose((2048, 2048), 1, 8, 8)
    ('dense-krylov', 'core')
    """
    paths = [
        p for p in get_args(Path) if (p in EXACT or not exact) and (p != "gram" or itemsize == 4)
    ]
    return min(paths, key=lambda p: cost(p, shape, terms, total_rank, rank, itemsize).seconds)
