"""The written cost model counts what really runs."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from lowrank.spectra import trained
from torch.utils.flop_counter import FlopCounterMode

from flexlora.lowrank import Options, Path, choose, cost, decompose


def in_place(_, x, y, out_shape=None, **__):
    return 2 * x[0] * x[1] * x[2] * y[2]


def products(path, terms, rank):
    """FLOPs in matrix products, counted by torch (which does not count QR and SVD)."""
    counted = {torch.ops.aten.baddbmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        found = decompose(terms, [1 / len(terms)] * len(terms), rank, options=Options(path=path))
    return counter.get_total_flops(), found.quality


@pytest.mark.parametrize("path", ["core", "gram", "dense"])
@pytest.mark.parametrize("shape", [(200, 300), (300, 200)])
def test_exact_paths(path, shape):
    ranks = [8] * 5 + [40] * 2
    counted, _ = products(path, trained(*shape, ranks), 40)
    expected = cost(path, shape, len(ranks), sum(ranks), 40).gemm
    if path == "gram":  # the float64 product is counted twice by the model
        expected -= 2 * shape[0] * shape[1] * min(shape)
    assert counted == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("path", ["krylov", "dense-krylov"])
def test_iterative_paths(path):
    """Within a factor: how far the subspace must grow depends on the spectrum."""
    ranks = [8] * 20 + [64] * 8
    counted, quality = products(path, trained(500, 400, ranks), 64)
    assert quality.applies > 0
    expected = cost(path, (500, 400), len(ranks), sum(ranks), 64).gemm
    assert expected / 2 < counted < expected * 2


def test_a_rounded_sum_is_the_same_work_and_what_measures_it():
    """Split between fast and full products; the former are those beyond each term's first rows."""
    ranks, (m, n) = [8] * 3 + [40] * 6, (500, 400)
    args = "dense-krylov", (m, n), len(ranks), sum(ranks), 40
    plain, fast = cost(*args), cost(*args, fast=True)
    assert plain.fast == 0
    assert fast.gemm + fast.fast == pytest.approx(plain.gemm + 32 * (sum(ranks) * (m + n) + m * n))
    assert fast.fast == 2 * m * n * (sum(ranks) - 8 * len(ranks))
    large = "dense-krylov", (2048, 2048), 80, 13192, 200
    assert cost(*large, fast=True).seconds < cost(*large).seconds


def test_the_choice():
    """Few ranks: the core; a large cohort: on the sum, or on its terms; all of a matrix: exact."""
    assert choose((2048, 2048), 1, 8, 8) == "core"
    assert choose((576, 576), 4, 32, 8) == "core"
    assert choose((2048, 2048), 80, 640, 8) == "krylov"
    assert choose((4096, 14336), 80, 3032, 200) == "krylov"
    assert choose((64, 64), 80, 640, 64) in ("gram", "dense")
    for path in (choose((2048, 2048), 80, 13192, 200, exact=True), choose((99, 99), 9, 99, 9, 8)):
        assert path in get_args(Path)
    assert choose((2048, 2048), 80, 13192, 2000, itemsize=8) != "gram"
