"""Orthonormal rows stay so, whatever is added to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.lowrank.basis import extend, orthonormal, small_svd
from flexlora.lowrank.krylov import start
from flexlora.lowrank.operators import DenseMatrix


def off(rows: torch.Tensor) -> float:
    """Largest deviation from orthonormality."""
    eye = torch.eye(rows.shape[1], dtype=torch.float64)
    wide = rows.double()
    return float((wide @ wide.mT - eye).abs().amax()) if rows.numel() else 0.0


@given(
    st.integers(0, 12),
    st.integers(1, 8),
    st.sampled_from(["random", "graded", "zero", "known", "equal"]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_extended_bases_are_orthonormal_and_hold_what_was_added(width, more, kind, dtype, seed):
    """Dependent, graded, zero and already known rows too; no more than there is room for."""
    d = 15
    g = torch.Generator().manual_seed(seed)
    known = orthonormal(torch.randn(1, width, d, generator=g).to(dtype))[0]
    Y = {
        "random": lambda: torch.randn(1, more, d, generator=g).to(dtype),
        "graded": lambda: (
            torch.randn(1, more, d, generator=g).to(dtype)
            * 10.0 ** -torch.arange(0, 3 * more, 3)[:, None].to(dtype)
        ),
        "zero": lambda: torch.zeros(1, more, d, dtype=dtype),
        "known": lambda: torch.randn(1, more, width, generator=g).to(dtype) @ known,
        "equal": lambda: torch.randn(1, 1, d, generator=g).to(dtype).expand(1, more, d),
    }[kind]()
    Q, C = extend(known, Y)
    assert Q.shape[1] == min(more, d - width)
    both = torch.cat([known, Q], 1)
    eps = torch.finfo(dtype).eps
    assert off(both) <= 100 * eps
    torch.testing.assert_close(C @ both, Y, rtol=0, atol=float(50 * eps * (1 + Y.norm())))


def test_one_dependent_module_does_not_spoil_the_others():
    g = torch.Generator().manual_seed(0)
    known = orthonormal(torch.randn(2, 4, 20, generator=g))[0]
    Y = torch.stack([torch.randn(6, 20, generator=g), torch.zeros(6, 20)])
    Q, C = extend(known, Y)
    both = torch.cat([known, Q], 1)
    assert off(both) < 1e-5
    torch.testing.assert_close(C @ both, Y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_identities_hold_as_a_subspace_grows(dtype):
    """`V D^T = M U` and `U D = T V`, past the room made at the start and past a restart."""
    g = torch.Generator().manual_seed(0)
    D = DenseMatrix(torch.randn(2, 60, 45, generator=g).to(dtype))
    X = orthonormal(torch.randn(2, 5, 45, generator=g).to(dtype))[0]
    space = start(X, 60, room=6)
    for step in range(6):
        space = space.applied(D.apply(space.new))
        torch.testing.assert_close(D.apply(space.V), space.M @ space.U, rtol=0, atol=1e-4)
        if step == 2:
            space = space.restarted(torch.randn(2, 3, 60, generator=g).to(dtype))
        space = space.applied_t(D.apply_t(space.new_t))
        torch.testing.assert_close(D.apply_t(space.U), space.T @ space.V, rtol=0, atol=1e-4)
    assert off(space.U) < 1e-5
    assert off(space.V) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
def test_small_svd(dtype, m, n):
    M = torch.randn(2, m, n, dtype=torch.float64) * 10.0 ** -torch.arange(0, m)[:, None]
    U, S = small_svd(M, m, dtype)
    expected = torch.linalg.svdvals(M)
    torch.testing.assert_close(S[:, : min(m, n)], expected, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close((U.mT @ M).norm(dim=2), S, rtol=1e-3, atol=1e-7)
    assert off(U.mT) < 1e-12
