"""Sums formed from factors rounded to bfloat16: what it costs is measured, and refused if much."""

from __future__ import annotations

import sys

import pytest
import torch
from lowrank.spectra import dense, trained, with_spectrum

from flexlora.lowrank import Options, decompose, rounded
from flexlora.lowrank.operators import DenseMatrix, weighted_sum

FAST = Options(path="dense-krylov")
FULL = Options(path="dense-krylov", fast_products=False)
decompose_module = sys.modules["flexlora.lowrank.decompose"]  # the function has the module's name


def by_hand(total):
    """What :func:`rounded_sum` computes, on any machine."""
    head, rest = total.part(slice(0, rounded.HEAD)), total.part(slice(rounded.HEAD, None))
    D = head.dense().D
    for k, term in enumerate(rest.modules[0]):
        D += rest.f[0, k] * (term.B.bfloat16().float() @ term.A.bfloat16().float())
    return DenseMatrix(D)


@pytest.fixture
def everywhere(monkeypatch):
    """Rounded sums on machines without matrix units too; tells how often they were formed."""
    formed = []
    monkeypatch.setattr(decompose_module, "has_fast_products", lambda *_: True)
    monkeypatch.setattr(
        decompose_module, "rounded_sum", lambda total: formed.append(1) or by_hand(total)
    )
    return formed


def test_a_noisy_cohort_keeps_it_and_says_what_it_cost(everywhere):
    ranks = [8] * 12 + [16] * 4 + [48] * 4
    terms, weights = trained(160, 220, ranks), [1 / 20] * 20
    S = torch.linalg.svdvals(dense(terms, weights))
    found, full = (decompose(terms, weights, 48, options=o) for o in (FAST, FULL))
    assert everywhere == [1]
    assert found.quality.applies == full.quality.applies + 2 * rounded.PROBES
    assert 0 < found.quality.excess <= 0.01
    error = (dense(terms, weights) - found.product.dense()).norm()
    assert error <= (1 + found.quality.excess) * S[48:].norm() * 1.01
    wrong = 1 - found.product.B.norm(dim=0) / S[:48]
    assert wrong.abs().amax() <= found.quality.sigma_error.amax()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("first", [1.0, 1e3])
def test_a_sum_whose_tail_is_below_the_rounding_is_formed_again(everywhere, first, seed):
    """Rank 20 and a tail of 1e-5: bfloat16 would put 1e-3 there."""
    sigma = torch.cat([torch.tensor([first]), torch.ones(19), torch.full((100,), 1e-5)]).double()
    terms = with_spectrum(sigma, 200, 150)
    found, full = (decompose(terms, [1.0] * 3, 20, seed, o) for o in (FAST, FULL))
    assert everywhere == [1]
    assert torch.equal(found.product.B, full.product.B)
    assert found.quality.excess == full.quality.excess


def test_the_rounding_is_measured(everywhere):
    """Its norm within the spread of 8 Gaussian rows, its effect on the weakest pairs as it is."""
    terms, weights = trained(160, 220, [8] * 12 + [48] * 4), [1 / 16] * 16
    total = weighted_sum([terms], weights)
    D = by_hand(total)
    wrong = (D.D - total.dense().D).double()
    found = decompose_module.block_krylov(D, 48, 0, 0.01, 0.05, total.like)
    estimate = rounded.with_rounding(found, total, D, seed=0).estimate
    assert bool((found.estimate.excess < estimate.excess).all())
    assert estimate.rounding.sqrt().item() == pytest.approx(float(wrong.norm()), rel=0.2)
    tilt = (wrong @ found.Vh.mT.double()).norm(dim=1)[:, -rounded.PROBES :]
    torch.testing.assert_close(
        estimate.tilt, tilt / found.S[:, -rounded.PROBES :].double(), rtol=0.02, atol=1e-6
    )


@pytest.mark.skipif(
    not rounded.has_fast_products(torch.float32, torch.device("cpu")),
    reason="this CPU has no bfloat16 matrix units (AMX), or torch is older than 2.11",
)
def test_the_matrix_units_compute_it_and_are_put_back():
    terms, weights = trained(256, 192, [8] * 12 + [64] * 4), [1 / 16] * 16
    total = weighted_sum([terms], weights)
    exact, found = total.dense().D, rounded.rounded_sum(total).D
    error = (found - exact).norm() / exact.norm()
    assert 1e-6 < error < 3e-3
    assert (found - by_hand(total).D).norm() <= error * exact.norm()
    again = total.dense().D
    assert torch.equal(exact, again), "the setting leaked"


def test_only_float32_on_a_cpu_is_rounded(monkeypatch):
    monkeypatch.setattr(rounded, "_has_matrix_units", lambda: True)
    assert rounded.has_fast_products(torch.float32, torch.device("cpu"))
    assert not rounded.has_fast_products(torch.float64, torch.device("cpu"))
    assert not rounded.has_fast_products(torch.float32, torch.device("cuda"))


def test_parts_of_a_sum_add_up():
    """Terms of few rows are in the first part only; blocks that were kept are cut too."""
    terms = [t.to(torch.bfloat16) for t in trained(80, 90, [3, 12, 5, 70, 9])]
    total = weighted_sum([terms], [0.1, 0.2, 0.3, 0.2, 0.2]).keeping(2**20)
    whole = total.dense().D
    parts = [total.part(s) for s in (slice(0, 8), slice(8, None))]
    assert [len(p.modules[0]) for p in parts] == [5, 3]
    for some in (parts, [p.merged(16) for p in parts], [p.keeping(2**20) for p in parts]):
        torch.testing.assert_close(sum(p.dense().D for p in some), whole)
