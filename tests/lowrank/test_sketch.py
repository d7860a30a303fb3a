"""The running sketch: linear, mergeable, close, honest."""

from __future__ import annotations

import math

import pytest
import torch
from lowrank.spectra import SPECTRA, dense, trained, with_spectrum

from flexlora.lowrank import LowRank, norm, running_sum


def summed(terms, weights, shape, rank, seed=0):
    total = running_sum(shape, rank, seed)
    for term, weight in zip(terms, weights, strict=True):
        total = total.add(term, weight)
    return total


def test_order_and_tree_do_not_matter():
    terms, weights = trained(60, 80, [4, 4, 12, 8]), [0.1, 0.2, 0.3, 0.4]
    one = summed(terms, weights, (60, 80), 12)
    back = summed(terms[::-1], weights[::-1], (60, 80), 12)
    left = summed(terms[:2], weights[:2], (60, 80), 12)
    right = summed(terms[2:], weights[2:], (60, 80), 12)
    for other in (back, left + right, right + left):
        torch.testing.assert_close(
            one.read(12).product.dense(), other.read(12).product.dense(), atol=1e-4, rtol=1e-3
        )
        assert other.weight == pytest.approx(1.0)


def test_low_rank_is_recovered():
    terms = with_spectrum(SPECTRA["low rank"](60), 60, 80)
    found = summed(terms, [1.0] * 3, (60, 80), 5).read(5)
    torch.testing.assert_close(
        found.product.dense().double(), dense(terms, [1.0] * 3), atol=1e-4, rtol=0
    )
    assert found.excess == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_error_is_estimated(seed):
    terms, weights = trained(150, 120, [4] * 6 + [20] * 2), [1 / 8] * 8
    found = summed(terms, weights, (150, 120), 20, seed).read(20)
    D = dense(terms, weights)
    error = (D - found.product.dense()).norm()
    assert found.error == pytest.approx(float(error), rel=0.25)
    assert found.norm == pytest.approx(float(D.norm()), rel=0.8)
    best = torch.linalg.svdvals(D)[20:].norm()
    assert error / best - 1 <= found.excess * 1.2 + 0.01


def test_degenerate_and_extreme():
    zero = LowRank(torch.zeros(20, 2), torch.ones(2, 30))
    found = running_sum((20, 30), 3).add(zero, 1.0).read(3)
    assert norm(found.product) == 0
    eye = found.product.A @ found.product.A.T
    torch.testing.assert_close(eye, torch.eye(3), atol=1e-5, rtol=0)
    for size in (1e-10, 1e10):
        term = LowRank(torch.randn(20, 2) * size, torch.randn(2, 30) * size)
        got = running_sum((20, 30), 3).add(term, 1.0).read(3)
        assert norm(got.product) == pytest.approx(norm(term), rel=1e-3)
        assert math.isfinite(got.error)


def test_refusals():
    total = running_sum((20, 30), 3)
    with pytest.raises(ValueError, match="expected \\(20, 30\\)"):
        total.add(LowRank(torch.ones(3, 1), torch.ones(1, 3)), 1.0)
    with pytest.raises(ValueError, match="NaN"):
        total.add(LowRank(torch.full((20, 1), torch.nan), torch.ones(1, 30)), 1.0)
    with pytest.raises(ValueError, match="same arguments"):
        total + running_sum((20, 30), 3, seed=1)
    with pytest.raises(ValueError, match="rank 9"):
        total.read(9)
