"""Block Krylov iteration from the inside: where it starts, what it counts, how it ends."""

from __future__ import annotations

import pytest
import torch
from lowrank.spectra import with_spectrum

from flexlora.lowrank.krylov import PROBES, block_krylov, judge, start, triples
from flexlora.lowrank.operators import DenseMatrix, weighted_sum


@pytest.mark.parametrize("formed", [False, True])
def test_it_starts_with_a_power_of_the_matrix(formed):
    """Stopped at once it gives the singular values of `Q^T D`, `Q` a basis of `D (D^T D)^p G`."""
    terms = with_spectrum(0.9 ** torch.arange(40).double(), 60, 50)
    total = weighted_sum([terms], [1.0] * 3, torch.float64)
    dense = total.dense()
    D = dense if formed else total
    found = block_krylov(D, 4, 0, torch.inf, torch.inf, total.like)
    X = torch.randn(16, 50, generator=torch.Generator().manual_seed(0)).double()
    for _ in range(D.power_steps):
        X = X @ dense.D[0].T @ dense.D[0]
    Q = torch.linalg.qr(dense.D[0] @ X.T)[0]
    expected = torch.linalg.svdvals(Q.T @ dense.D[0])[:4]
    torch.testing.assert_close(found.S[0], expected, rtol=1e-9, atol=0)
    assert found.applies == 2 * (16 * D.power_steps + 16 + PROBES)


@pytest.mark.parametrize("largest", [10.0, 1e3])
def test_what_the_last_half_step_adds_leaves_the_tail(largest):
    """Of diag(largest, 3, 2, 1, 1 / 2) rows 2 and 3 are known, row 1 is new: the tail is 2^2."""
    D = DenseMatrix(torch.diag(torch.tensor([largest, 3.0, 2.0, 1.0, 0.5]))[None])
    unit = torch.eye(5)[None]
    before = start(unit[:, 1:3], 5, room=5).applied(D.apply(unit[:, 1:3])).restarted(unit[:, :1])
    space = before.applied_t(D.apply_t(before.new_t))
    nothing = torch.zeros(1, dtype=torch.float64)
    estimate, span = judge(before, space, nothing, 2, None)
    found = triples(space, 2, 0, nothing, estimate, span).estimate
    assert found.squares[0].tolist() == pytest.approx([largest**2, 9.0], rel=1e-5)
    assert found.tail.item() == pytest.approx(4.0, rel=1e-4)
