"""Fifty rounds of FlexLoRA: the randomized path keeps the exact path's collapse curve."""

from __future__ import annotations

import pytest
import torch
from lowrank.spectra import trained

from flexlora.lowrank import LowRank, Options, Path, hand_out, svd_sum

RANKS = [4] * 6 + [12] * 2 + [32] * 2
WEIGHTS = [0.1] * 10


def train(adapter: LowRank, target: torch.Tensor) -> LowRank:
    """A client's local training: gradient steps on the distance to its own target matrix."""
    B, A, s = adapter.B, adapter.A, adapter.scaling
    for _ in range(3):
        error = s * (B @ A) - target
        B, A = B - 0.05 * error @ A.T / s, A - 0.05 * s * B.T @ error
    return LowRank(B, A, s)


def collapse(path: Path) -> torch.Tensor:
    """Energy beyond the smallest rank, round after round."""
    G = svd_sum(trained(240, 320, RANKS), WEIGHTS, 32, options=Options(path="dense"))
    common = G.dense()
    g = torch.Generator().manual_seed(0)
    noise = common.norm() / common.numel() ** 0.5
    targets = [common + noise * torch.randn(common.shape, generator=g) for _ in RANKS]
    curve = []
    for round in range(50):
        sent = [hand_out(G, r, 16 / r) for r in RANKS]
        terms = [train(x, target) for x, target in zip(sent, targets, strict=True)]
        G = svd_sum(terms, WEIGHTS, 32, seed=round, options=Options(path=path))
        S = G.B.norm(dim=0) ** 2
        curve.append(S[4:].sum() / S.sum())
    return torch.stack(curve)


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    return collapse("dense")


@pytest.mark.parametrize("path", ["krylov", "dense-krylov"])
def test_fifty_rounds(path, exact):
    torch.testing.assert_close(collapse(path), exact, rtol=0.01, atol=0)
