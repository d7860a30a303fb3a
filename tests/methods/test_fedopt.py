"""Server momentum and Adam against hand-written loops, and where they are refused."""

from __future__ import annotations

import pytest
import reference
import torch
from cohorts import EQUAL, MIXED, SHAPES, collect, effective, first_state, play

from flexlora.federation.state import Penalty
from flexlora.methods import make


def inner_steps(name, rounds, outer, clients):
    """Per round: state before, the wrapped rule's result there, and the wrapper's result."""
    inner = make(name)
    state = first_state(inner)
    for _ in range(rounds):
        updates = collect(inner, state, clients)
        after = outer.aggregate(state, updates)
        yield state, inner.aggregate(state, updates), after
        state = after


def test_momentum_on_products_is_the_dense_recursion():
    outer = make("fedavgm", of="flexlora", lr=0.7, momentum=0.6)
    v = {m: torch.zeros(s, dtype=torch.float64) for m, s in SHAPES.items()}
    for before, plain, after in inner_steps("flexlora", 4, outer, MIXED):
        for m in SHAPES:
            v[m] = 0.6 * v[m] + plain.G[m].dense() - before.G[m].dense()
            expected = reference.trunc(before.G[m].dense() + 0.7 * v[m], before.G[m].rank)
            torch.testing.assert_close(after.G[m].dense(), expected)


@pytest.mark.parametrize(("name", "clients"), [("fedavg", EQUAL), ("ffa-lora", MIXED)])
def test_momentum_on_factors(name, clients):
    outer = make("fedavgm", of=name, lr=0.7, momentum=0.6)
    v = {(m, x): 0.0 for m in SHAPES for x in "AB"}
    for before, plain, after in inner_steps(name, 4, outer, clients):
        for m, x in v:
            old, new = getattr(before.G[m], x), getattr(plain.G[m], x)
            v[m, x] = 0.6 * v[m, x] + new - old
            torch.testing.assert_close(getattr(after.G[m], x), old + 0.7 * v[m, x])


@pytest.mark.parametrize(("name", "clients"), [("fedavg", EQUAL), ("ffa-lora", MIXED)])
def test_adam_is_algorithm_2_entry_by_entry(name, clients):
    outer = make("fedadam", of=name, lr=0.1, beta1=0.8, beta2=0.9, tau=0.01)
    m1 = {(m, x): 0.0 for m in SHAPES for x in "AB"}
    m2 = {(m, x): 1e-4 for m in SHAPES for x in "AB"}
    for before, plain, after in inner_steps(name, 4, outer, clients):
        for m, x in m1:
            old, new = getattr(before.G[m], x), getattr(plain.G[m], x)
            m1[m, x] = 0.8 * m1[m, x] + 0.2 * (new - old)
            m2[m, x] = 0.9 * m2[m, x] + 0.1 * (new - old) ** 2
            step = 0.1 * m1[m, x] / (m2[m, x] ** 0.5 + 0.01)
            torch.testing.assert_close(getattr(after.G[m], x), old + step)


def test_the_resting_factor_of_rolora_rests():
    method = make("fedadam", of="rolora")
    one = play(method, 1)
    two = play(method, 1, state=one)
    for m in SHAPES:
        assert torch.equal(one.G[m].A, first_state(method).G[m].A)
        assert torch.equal(two.G[m].B, one.G[m].B)
        assert not torch.equal(two.G[m].A, one.G[m].A)


def test_plain_settings_are_the_wrapped_method():
    for name in ("flexlora", "rbla", "fedavg"):
        inner, outer = make(name), make("fedavgm", of=name, lr=1.0, momentum=0.0)
        for m in SHAPES:
            x, y = (effective(play(method, 3), method)[m] for method in (inner, outer))
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("wrapper", "of", "reason"),
    [
        ("fedadam", "flexlora", "new basis every round"),
        ("fedadam", "flexlora-memory", "new basis every round"),
        ("fedadam", "flora", "goes into the patch"),
        ("fedavgm", "fedex-lora", "goes into the patch"),
        ("slora", "flora", "must average adapters"),
        ("slora", "fedsa-lora", "must average adapters"),
    ],
)
def test_combinations_that_mean_nothing_are_refused_with_a_sentence(wrapper, of, reason):
    with pytest.raises(ValueError, match=f"{wrapper}.*{of}.*{reason}"):
        make(wrapper, of=of)


def test_fedprox_adds_its_term_to_any_payload():
    for of in ("flexlora", "fedavg", "flora"):
        method, inner = make("fedprox", of=of, mu=0.3), make(of)
        payload = method.downlink(first_state(method), EQUAL[0])
        assert payload.penalty == Penalty("prox", 0.3)
        assert inner.downlink(first_state(inner), EQUAL[0]).penalty is None
        assert method.mixed_ranks == inner.mixed_ranks


@pytest.mark.parametrize(("of", "reason"), [("hetlora", "local loss term"), ("full", "no factors")])
def test_fedprox_refuses_what_it_cannot_wrap(of, reason):
    method = make("fedprox", of=of)
    with pytest.raises(ValueError, match=reason):
        method.downlink(first_state(method), MIXED[0])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fedavgm", {"lr": 0.0}),
        ("fedavgm", {"momentum": 1.0}),
        ("fedadam", {"tau": 0.0}),
        ("fedadam", {"beta2": 1.5}),
        ("fedprox", {"mu": 0.0}),
        ("slora", {"rounds": 0}),
    ],
)
def test_settings_out_of_range_are_refused(name, settings):
    with pytest.raises(ValueError, match=f"{name}.*{next(iter(settings))}"):
        make(name, **settings)
