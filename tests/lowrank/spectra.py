"""Sums of products whose singular values are known, and cohorts that look trained."""

from __future__ import annotations

import torch

from flexlora.lowrank import LowRank

SPECTRA = {
    "geometric": lambda n: 0.9 ** torch.arange(n),
    "harmonic": lambda n: 1 / torch.arange(1.0, n + 1),
    "square root": lambda n: torch.arange(1.0, n + 1) ** -0.5,
    "linear": lambda n: 1 - torch.arange(n) / n,
    "one large": lambda n: torch.cat([torch.tensor([50.0]), 1 - torch.arange(n - 1) / n]),
    "repeated": lambda n: torch.cat([torch.ones(n // 3), torch.full((n - n // 3,), 0.01)]),
    "all equal": lambda n: torch.ones(n),
    "low rank": lambda n: torch.where(torch.arange(n) < 5, 1.0, 0.0),
}


def orthogonal(rows: int, columns: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=g, dtype=torch.float64))[0]


def with_spectrum(sigma: torch.Tensor, d_out: int, d_in: int, pieces: int = 3) -> list[LowRank]:
    """Terms that add up to one matrix of these singular values."""
    k = len(sigma)
    B = orthogonal(d_out, k, 1) * sigma
    A = orthogonal(d_in, k, 2).T
    cuts = torch.arange(k).tensor_split(pieces)
    return [LowRank(B[:, c].float() * 2, A[c].float(), 0.5) for c in cuts]


def trained(d_out: int, d_in: int, ranks: list[int], seed: int = 0) -> list[LowRank]:
    """A decaying common signal, cut at each rank, plus noise in every factor."""
    g = torch.Generator().manual_seed(seed)
    top = max(ranks)
    root = torch.arange(1.0, top + 1) ** -0.5
    B = orthogonal(d_out, top, seed + 1).float() * root
    A = orthogonal(d_in, top, seed + 2).float().T * root[:, None]

    def noise(rows: int, columns: int) -> torch.Tensor:
        return 0.5 * (rows * columns) ** -0.5 * torch.randn(rows, columns, generator=g)

    return [LowRank(B[:, :r] + noise(d_out, r), A[:r] + noise(r, d_in), 16 / r) for r in ranks]


def dense(terms: list[LowRank], weights: list[float]) -> torch.Tensor:
    return sum(
        w * t.scaling * (t.B.double() @ t.A.double()) for t, w in zip(terms, weights, strict=True)
    )
