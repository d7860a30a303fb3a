"""Every path to the SVD of a sum, against the dense one in float64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank.spectra import SPECTRA, dense, orthogonal, trained, with_spectrum

from flexlora.lowrank import LowRank, Options, Path, decompose, decompose_modules, norm, svd_sum

PATHS = get_args(Path)
ITERATIVE = ("krylov", "dense-krylov")


def assert_svd_form(product: LowRank, rank: int) -> None:
    assert product.rank == rank
    assert product.scaling == 1.0
    S = product.B.norm(dim=0)
    assert bool((S[:-1] >= S[1:] * (1 - 1e-5)).all())
    eye = torch.eye(rank, dtype=product.A.dtype)
    torch.testing.assert_close(product.A @ product.A.T, eye, atol=1e-5, rtol=0)
    Q = product.B[:, S > 0] / S[S > 0]
    eye = torch.eye(Q.shape[1], dtype=Q.dtype)
    torch.testing.assert_close(Q.T @ Q, eye, atol=1e-4, rtol=0)


@st.composite
def cohorts(draw):
    d_out, d_in = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    ranks = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    rank = draw(st.integers(1, min(d_out, d_in)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    terms = [
        LowRank(torch.randn(d_out, r, generator=g), torch.randn(r, d_in, generator=g), 2.0 / r)
        for r in ranks
    ]
    return terms, [1 / len(ranks)] * len(ranks), rank


@given(cohorts(), st.sampled_from(PATHS))
@settings(max_examples=150, deadline=None)
def test_close_to_the_best_at_every_shape_and_rank(cohort, path):
    terms, weights, rank = cohort
    D = dense(terms, weights)
    found = decompose(terms, weights, rank, options=Options(path=path))
    assert_svd_form(found.product, rank)
    S = torch.linalg.svdvals(D)
    slack = 0.01 if path in ITERATIVE else 1e-4
    error = (D - found.product.dense()).norm()
    assert error <= S[rank:].norm() * (1 + slack) + 1e-5 * S[0]
    torch.testing.assert_close(
        found.product.B.norm(dim=0).double(), S[:rank], rtol=0.06, atol=1e-4 * float(S[0])
    )


@pytest.mark.parametrize("path", ITERATIVE)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, 6, 24, 60])
def test_the_estimates_hold(name, rank, path):
    """Excess within the tolerance; each singular value within its own; estimates near the truth."""
    sigma = SPECTRA[name](150).double()
    terms = with_spectrum(sigma, 200, 150)
    D = dense(terms, [1.0] * 3)
    found = decompose(terms, [1.0] * 3, rank, options=Options(path=path))
    product, quality = found.product, found.quality
    rounding = 2e-5 * sigma.norm()
    best = sigma[rank:].norm() + rounding
    excess = (D - product.dense()).norm() / best - 1
    assert excess <= 0.01
    assert excess <= 2 * quality.excess + 1e-3
    wrong = (1 - product.B.norm(dim=0).double() / sigma[:rank])[sigma[:rank] > 1e-3]
    assert wrong.amax() <= 0.10
    assert wrong.amax() <= 2 * quality.sigma_error.amax() + 1e-3


@pytest.mark.parametrize("path", ITERATIVE)
def test_subspace_angles_are_bounded_by_the_reported_ones(path):
    """Wedin: the sine to the true subspace is at most the pair's residual over the gap."""
    sigma = torch.cat([torch.linspace(2, 1, 10), 0.5 * 0.98 ** torch.arange(140.0)]).double()
    terms = with_spectrum(sigma, 200, 150)
    found = decompose(terms, [1.0] * 3, 10, options=Options(path=path))
    D = dense(terms, [1.0] * 3)
    V = orthogonal(150, 150, 2)[:, :10]
    sine = torch.linalg.svdvals(found.product.A.double() @ V).amin().clamp_max(1).acos().sin()
    S = found.product.B.norm(dim=0).double()
    U = found.product.B.double() / S
    V = found.product.A.T.double()
    residual = torch.maximum((D.T @ U - V * S).norm(dim=0), (D @ V - U * S).norm(dim=0)) / S
    assert bool((residual <= found.quality.angle + 1e-5).all())
    assert residual.amax() > 1e-3
    assert sine <= (found.quality.angle * S).norm() / 0.5 * 3 + 1e-3


@pytest.mark.parametrize("path", ITERATIVE)
def test_real_looking_cohorts_and_every_prefix(path):
    """Also the tail that small clients never see is right, not only the Frobenius norm."""
    ranks = [4] * 12 + [16] * 4 + [48] * 4
    terms = trained(160, 220, ranks)
    weights = [1 / 20] * 20
    D = dense(terms, weights)
    S = torch.linalg.svdvals(D)
    found = decompose(terms, weights, 48, options=Options(path=path))
    for r in (4, 16, 48):
        error = (D - found.product.prefix(r).dense()).norm()
        assert error <= 1.01 * S[r:].norm()
    wrong = 1 - found.product.B.norm(dim=0) / S[:48]
    assert wrong.amax() <= 0.05


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("exponent", [-20, -10, 0, 10, 20])
def test_scale_makes_no_difference(path, exponent):
    terms = trained(40, 30, [3, 9, 5])
    weights = [0.2, 0.5, 0.3]
    power = 2.0 ** round(exponent * 3.3219)
    half = 2.0 ** round(exponent * 3.3219 / 2)
    scaled = [LowRank(t.B * half, t.A * (power / half), t.scaling) for t in terms]
    options = Options(path=path)
    x, y = (svd_sum(t, weights, 12, options=options) for t in (terms, scaled))
    torch.testing.assert_close(x.A, y.A, atol=1e-5, rtol=0)
    torch.testing.assert_close(x.B, y.B / power, atol=1e-5, rtol=1e-5)


def test_factors_of_opposite_extreme_scale():
    terms = trained(40, 30, [3, 9])
    scaled = [LowRank(t.B * 1e-20, t.A * 1e20, t.scaling) for t in terms]
    x, y = svd_sum(terms, [0.5, 0.5], 5), svd_sum(scaled, [0.5, 0.5], 5)
    torch.testing.assert_close(x.dense(), y.dense(), atol=1e-4, rtol=1e-4)


def test_beyond_the_range_of_the_dtype_is_an_error():
    terms = [LowRank(torch.full((4, 1), 1e30), torch.full((1, 4), 1e30))]
    with pytest.raises(OverflowError, match="float64"):
        svd_sum(terms, [1.0], 1)
    found = svd_sum(terms, [1.0], 1, options=Options(dtype=torch.float64))
    assert norm(found) == pytest.approx(4e60)


@pytest.mark.parametrize("path", PATHS)
def test_zero_updates_give_directions_to_train(path):
    zero = [LowRank(torch.zeros(12, 3), torch.randn(3, 9))] * 2
    found = svd_sum(zero, [0.5, 0.5], 4, options=Options(path=path))
    assert_svd_form(found, 4)
    assert norm(found) == 0


@pytest.mark.parametrize("path", PATHS)
def test_rank_above_the_numerical_rank(path):
    terms = with_spectrum(SPECTRA["low rank"](30), 40, 30)
    found = svd_sum(terms, [1.0] * 3, 20, options=Options(path=path))
    assert_svd_form(found, 20)
    assert found.B.norm(dim=0)[5:].amax() < 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_summed_in_float32(path, dtype):
    terms = [t.to(dtype) for t in trained(40, 30, [3, 9, 5])]
    weights = [0.2, 0.5, 0.3]
    found = svd_sum(terms, weights, 17, options=Options(path=path))
    assert found.B.dtype == torch.float32
    S = torch.linalg.svdvals(dense(terms, weights))
    torch.testing.assert_close(found.B.norm(dim=0).double(), S[:17], rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_float64_on_request(path):
    terms = trained(40, 30, [3, 9, 5])
    weights = [0.2, 0.5, 0.3]
    found = svd_sum(terms, weights, 17, options=Options(path=path, dtype=torch.float64))
    D = dense(terms, weights)
    S = torch.linalg.svdvals(D)
    atol = 0.05 if path in ITERATIVE else 1e-12
    torch.testing.assert_close(found.B.norm(dim=0), S[:17], rtol=atol, atol=1e-12)


def test_tolerance_zero_is_exact():
    terms = trained(300, 300, [4] * 80)
    found = decompose(terms, [1 / 80] * 80, 4, options=Options(tolerance=0))
    assert found.quality.path in ("core", "gram", "dense")
    assert found.quality.excess == 0


@pytest.mark.parametrize("path", PATHS)
def test_same_input_same_bits(path):
    terms = trained(100, 80, [4] * 20 + [20] * 4)
    run = lambda: svd_sum(terms, [1 / 24] * 24, 20, seed=3, options=Options(path=path))  # noqa: E731
    x, y = run(), run()
    assert torch.equal(x.A, y.A)
    assert torch.equal(x.B, y.B)


def test_cached_and_streamed_blocks_agree():
    """Memory allowed changes nothing but time."""
    terms = [t.to(torch.bfloat16) for t in trained(100, 80, [4] * 20 + [20] * 4)]
    x, y = (
        svd_sum(terms, [1 / 24] * 24, 20, options=Options(path="krylov", cache_bytes=b))
        for b in (0, 2**26)
    )
    assert torch.equal(x.A, y.A)


@pytest.mark.parametrize("path", PATHS)
def test_modules_together_equal_modules_alone(path):
    modules = [trained(60, 50, [2, 8, 5], seed) for seed in range(3)]
    weights = [0.2, 0.5, 0.3]
    options = Options(path=path, tolerance=1e-4)
    together = decompose_modules(modules, weights, 6, options=options)
    for terms, one in zip(modules, together, strict=True):
        alone = svd_sum(terms, weights, 6, options=options)
        torch.testing.assert_close(one.product.dense(), alone.dense(), atol=1e-4, rtol=1e-3)


def test_errors_name_what_is_wrong():
    good = LowRank(torch.ones(3, 1), torch.ones(1, 4))
    bad = LowRank(torch.full((3, 1), torch.nan), torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"term 1 .* NaN"):
        svd_sum([good, bad], [0.5, 0.5], 1)
    with pytest.raises(ValueError, match="expected 1 to 3"):
        svd_sum([good], [1.0], 4)
    with pytest.raises(ValueError, match="no terms"):
        svd_sum([], [], 1)
    with pytest.raises(ValueError, match="one shape"):
        svd_sum([good, LowRank(torch.ones(4, 1), torch.ones(1, 3))], [0.5, 0.5], 1)
    with pytest.raises(ValueError, match="one weight per term"):
        svd_sum([good], [0.5, 0.5], 1)
