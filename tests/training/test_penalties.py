"""Local loss terms: batched equals one by one equals dense, with gradients."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.federation.state import Penalty
from flexlora.training.penalties import prox, tail, value


def stacked(ranks, d_out, d_in, seed):
    """Random factors of each slot, zero beyond its rank."""
    random = torch.Generator().manual_seed(seed)
    B = torch.randn(len(ranks), d_out, max(ranks), generator=random, dtype=torch.float64)
    A = torch.randn(len(ranks), max(ranks), d_in, generator=random, dtype=torch.float64)
    for k, r in enumerate(ranks):
        B[k, :, r:], A[k, r:] = 0, 0
    return B, A


shapes = st.tuples(
    st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 6), st.integers(1, 6)
)


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(0, 99))
def test_prox_equals_the_dense_distance_and_its_gradient(shape, seed):
    ranks, d_out, d_in = shape
    now, sent = stacked(ranks, d_out, d_in, seed), stacked(ranks, d_out, d_in, seed + 1)
    s = torch.arange(1.0, len(ranks) + 1, dtype=torch.float64) / 2
    now = tuple(t.requires_grad_() for t in now)
    got = prox(now, sent, s)
    dense = s[:, None, None] * (now[0] @ now[1] - sent[0] @ sent[1])
    expected = 0.5 * (dense**2).sum((1, 2))
    torch.testing.assert_close(got, expected)
    for g, e in zip(
        torch.autograd.grad(got.sum(), now), torch.autograd.grad(expected.sum(), now), strict=True
    ):
        torch.testing.assert_close(g, e)
    g = torch.autograd.grad(prox(now, sent, s).sum(), now)
    for k, r in enumerate(ranks):
        assert not g[0][k, :, r:].any()
        assert not g[1][k, r:].any()


def test_prox_keeps_its_digits_in_float32():
    B, A = (t.float() for t in stacked([4], 30, 40, 0))
    near = (B + 1e-4 * torch.randn_like(B), A)
    got = prox(near, (B, A), torch.ones(1))
    wide = (near[0].double() @ near[1].double() - B.double() @ A.double()).square().sum() / 2
    torch.testing.assert_close(got[0].double(), wide, rtol=1e-4, atol=0)


def test_prox_of_the_start_is_zero_with_zero_gradient():
    now = tuple(t.requires_grad_() for t in stacked([3, 1], 5, 4, 0))
    got = prox(now, tuple(t.detach() for t in now), torch.tensor([2.0, 3.0]))
    assert not got.any()
    assert all(not g.any() for g in torch.autograd.grad(got.sum(), now))


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(0, 99), st.sampled_from([0.3, 0.5, 0.99]))
def test_tail_equals_slices_slot_by_slot(shape, seed, gamma):
    ranks, d_out, d_in = shape
    B, A = (t.requires_grad_() for t in stacked(ranks, d_out, d_in, seed))
    got = tail(B, A, torch.tensor(ranks), gamma)
    for k, r in enumerate(ranks):
        t = max(1, int(gamma * r))
        torch.testing.assert_close(got[k], B[k, :, t:r].norm() * A[k, t:r].norm())
    for g in torch.autograd.grad(got.sum(), (B, A)):
        assert torch.isfinite(g).all()


def test_tail_of_zero_factors_has_no_gradient():
    B, A = stacked([4], 3, 5, 0)
    B = torch.zeros_like(B).requires_grad_()
    (g,) = torch.autograd.grad(tail(B, A, torch.tensor([4]), 0.5).sum(), B)
    assert not g.any()


def test_value_applies_the_coefficient():
    now, sent = stacked([2, 3], 4, 5, 0), stacked([2, 3], 4, 5, 1)
    s, ranks = torch.tensor([0.5, 2.0]), torch.tensor([2, 3])
    near = value(Penalty("prox", 0.1), now, sent, s, ranks)
    torch.testing.assert_close(near, 0.1 * prox(now, sent, s))
    ends = value(Penalty("tail", 0.2, 0.5), now, sent, s, ranks)
    torch.testing.assert_close(ends, 0.2 * tail(*now, ranks, 0.5))
