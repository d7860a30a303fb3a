"""What every method must satisfy; each test catches a bug seen in a published implementation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference
import torch
from cohorts import (
    EQUAL,
    LARGE,
    MIXED,
    SHAPES,
    SMALL,
    clients_for,
    collect,
    effective,
    first_state,
    noise,
    nothing,
    play,
)

from flexlora.federation.state import floats_down, floats_up
from flexlora.lowrank import LowRank
from flexlora.methods import make, methods

ALL = sorted(methods)
SETTINGS = {"hetlora": {"prune": False}}
STEPPED = {"fedavgm", "fedadam"}  # the server's own step: see test_fedopt.py
SPARSE = {"slora", "full"}
SPLITS = [{"split": s} for s in ("B", "balanced", "A")]

RETAINED = {
    "flexlora": "q",
    "flexlora-released": "q",
    "fedprox": "q",
    "ffa-lora": "q",
    "rolora": "q",
    "hetlora": "q^2",
}
"""What a round without training leaves of component j; 1 where a method is not named."""


def build(name, **settings):
    return make(name, **{**SETTINGS.get(name, {}), **settings})


def assert_close(x, y, atol=1e-9):
    assert set(x) == set(y)
    for m in x:
        torch.testing.assert_close(x[m], y[m], rtol=1e-9, atol=atol)


def test_every_method_has_a_dense_rule():
    assert set(reference.RULES) | STEPPED == set(methods)


@pytest.mark.parametrize("name", sorted(reference.RULES))
@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_equals_the_dense_rule(name, rounds):
    method = build(name)
    before = play(method, rounds - 1)
    updates = collect(method, before, clients_for(method))
    after = effective(method.aggregate(before, updates), method)
    rule = reference.RULES[name]
    expected = {m: rule(before, m, updates.module(m), updates.weights) for m in SHAPES}
    assert_close(after, expected)


@pytest.mark.parametrize("name", ["flexlora", "flexlora-memory", "raflora"])
@pytest.mark.parametrize("settings", SPLITS)
def test_a_client_gets_the_best_approximation_at_its_rank(name, settings):
    method = build(name, **settings)
    state = play(method, 2)
    whole = effective(state, method)
    for client in MIXED:
        part = effective(state, method, client)
        expected = {m: reference.trunc(whole[m], client.lora.rank(m)) for m in SHAPES}
        assert_close(part, expected)


@pytest.mark.parametrize("name", ALL)
def test_the_round_advances_and_nothing_is_changed_in_place(name):
    method = build(name)
    state = first_state(method)
    held = {m: d.clone() for m, d in state.G.items()}
    after = play(method, 1, state=state)
    assert (state.round, after.round, after.base, after.seed) == (0, 1, state.base, state.seed)
    for m, d in state.G.items():
        assert torch.equal(held[m].B, d.B)
        assert torch.equal(held[m].A, d.A)
        assert (after.G[m].shape, after.G[m].rank) == (d.shape, d.rank)


@pytest.mark.parametrize("name", ALL)
def test_what_is_sent_has_the_configured_rank_and_scaling(name):
    method = build(name)
    state = play(method, 2)
    for client in clients_for(method):
        payload = method.downlink(state, client)
        assert (payload.client, payload.round, payload.base) == (client.id, 3, "base")
        for m, d in payload.adapter.items():
            if m not in payload.mask:
                expected = (client.lora.rank(m), client.lora.scaling(m), SHAPES[m])
                assert (d.rank, d.scaling, d.shape) == expected


@pytest.mark.parametrize("name", sorted(set(ALL) - SPARSE - STEPPED - {"flexlora-released"}))
def test_the_scaling_is_one_number_in_three_places(name):
    """Trained with, folded by the server, handed out: another alpha changes no product."""
    method = build(name)
    state = play(method, 3)
    clients = clients_for(method)
    changed = [replace(c, lora=replace(c.lora, lora_alpha=3 * c.lora.lora_alpha)) for c in clients]
    for before, after in zip(clients, changed, strict=True):
        assert_close(effective(state, method, before), effective(state, method, after))

    def sent(payload):  # the same product whatever the scaling, trained by the same amount
        return {m: LowRank(d.B + 3 / d.scaling, d.A, d.scaling) for m, d in payload.adapter.items()}

    x, y = (play(method, 1, c, sent, state) for c in (clients, changed))
    assert_close(effective(x, method), effective(y, method))


@pytest.mark.parametrize("name", ALL)
def test_order_of_arrival_does_not_matter(name):
    method = build(name)
    state = play(method, 1)
    clients = clients_for(method)
    x, y = (method.aggregate(state, collect(method, state, c)) for c in (clients, clients[::-1]))
    for m in SHAPES:
        assert torch.equal(x.G[m].B, y.G[m].B)
        assert torch.equal(x.G[m].A, y.G[m].A)


@pytest.mark.parametrize("name", sorted(set(ALL) - STEPPED - {"flexlora-released"}))
@pytest.mark.parametrize("count", [1, 3])
def test_one_client_or_equal_clients_are_the_identity(name, count):
    method = build(name)
    state = play(method, 2)
    clients = [replace(LARGE, id=f"c{i}", num_examples=5 + i) for i in range(count)]

    def alike(payload):
        return noise(replace(payload, client="same"))

    trained = alike(method.downlink(state, clients[0]))
    after = play(method, 1, clients, alike, state)
    if name == "fedsa-lora":
        assert_close({m: d.A for m, d in after.G.items()}, {m: d.A for m, d in trained.items()})
        return
    base = {m: reference.patch_of(state, m) for m in SHAPES}
    expected = {m: reference.product(d) + base[m] for m, d in trained.items() if name not in SPARSE}
    if name in SPARSE:
        updates = collect(method, state, clients, alike)
        expected = {
            m: reference.sparse(state, m, updates.module(m), updates.weights) for m in SHAPES
        }
    assert_close(effective(after, method), expected)


@pytest.mark.parametrize("name", ["flexlora", "flexlora-memory", "flora", "raflora", "rbla"])
def test_only_methods_on_products_are_free_of_the_gauge(name):
    """`(B Q, Q^-1 A)` is the same update."""
    method = build(name)
    state = play(method, 2)

    def turned(payload):
        moved = {}
        for m, d in noise(payload).items():
            Q = torch.eye(d.rank, dtype=torch.float64) + 0.3 * torch.ones(d.rank, d.rank).tril(-1)
            moved[m] = LowRank(d.B @ Q, torch.linalg.inv(Q) @ d.A, d.scaling)
        return moved

    x, y = (effective(play(method, 1, train=t, state=state), method) for t in (noise, turned))
    if name in ("raflora", "rbla"):
        assert not torch.allclose(x["q"], y["q"], atol=1e-3)
    else:
        assert_close(x, y)


@pytest.mark.parametrize("name", sorted(n for n in ALL if make(n).exact))
def test_exact_methods_give_the_mean_product(name):
    method = build(name)
    for rounds in (1, 2, 3):
        state = play(method, rounds - 1)
        updates = collect(method, state, clients_for(method))
        after = effective(method.aggregate(state, updates), method)
        for m in SHAPES:
            if name in SPARSE:
                expected = reference.sparse(state, m, updates.module(m), updates.weights)
            else:
                expected = reference.mean_product(updates.module(m), updates.weights)
                expected = expected + reference.patch_of(state, m)
            if method.averages == "products":
                expected = reference.trunc(expected, state.G[m].rank)
            torch.testing.assert_close(after[m], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(ALL) - STEPPED))
def test_a_round_without_training(name):
    """A no-op where the method says so, the retention q_j exactly where it does not."""
    method = build(name)
    before = play(method, 2)
    updates = collect(method, before, clients_for(method), nothing)
    after = effective(method.aggregate(before, updates), method)
    for m in SHAPES:
        g, weights, terms = before.G[m], updates.weights, updates.module(m)
        power = {"q": 1, "q^2": 2}.get(RETAINED.get(name, ""), 0)
        if name == "hetlora":
            norms = [float(reference.product(d).norm()) for d in terms]
            weights = [n / sum(norms) for n in norms]
        expected = reference.patch_of(before, m)
        for j in range(g.rank):
            q = sum(p for p, d in zip(weights, terms, strict=True) if j < d.rank)
            expected = expected + q**power * torch.outer(g.B[:, j], g.A[j])
        torch.testing.assert_close(after[m], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"flexlora-released"}))  # sums other products
def test_linear_methods_see_only_the_sum(name):
    """Changes of single clients that cancel in the weighted sum: a secure sum could serve."""
    method = build(name)
    state = play(method, 1)
    X = {m: torch.randn(SHAPES[m][0], 1, dtype=torch.float64).sign() for m in SHAPES}

    def shifted(sign):
        def train(payload):
            shift = sign if payload.client == SMALL.id else -sign
            n = {c.id: c.num_examples for c in MIXED}[payload.client]
            moved = {}
            for m, d in payload.adapter.items():
                B = d.B.clone() + torch.arange(1.0, d.B.shape[1] + 1)
                size = min(SMALL.lora.rank(m), d.rank)
                change = X[m] if m not in payload.mask else torch.ones_like(B)
                B[:, :size] += shift * change / (n * d.scaling)
                moved[m] = LowRank(B, d.A, d.scaling)
            return moved

        return train

    clients = clients_for(method)
    x, y = (effective(play(method, 1, clients, shifted(s), state), method) for s in (0.0, 1.0))
    same = all(torch.allclose(x[m], y[m], rtol=1e-8, atol=1e-8) for m in SHAPES)
    assert same == method.linear


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_trained_does_not_move(name):
    """A frozen factor leaves the server as it came in."""
    method = build(name)
    state = play(method, 1)
    for client in clients_for(method):
        payload = method.downlink(state, client)
        for m, d in noise(payload).items():
            assert torch.equal(d.A, payload.adapter[m].A) == ("A" not in payload.train)
            assert torch.equal(d.B, payload.adapter[m].B) == ("B" not in payload.train)


def test_fedsa_averages_A_over_its_owners_and_never_B():
    method = make("fedsa-lora")
    for rounds in (1, 2):
        before = play(method, rounds - 1)
        updates = collect(method, before, MIXED)
        after = method.aggregate(before, updates)
        for m in SHAPES:
            terms, weights = updates.module(m), updates.weights
            _, rows = reference.mean_factors(before.G[m], terms, weights, owners_only=True)
            torch.testing.assert_close(after.G[m].A, torch.stack(rows))
            assert not after.G[m].B.any()


def test_rolora_starts_with_B_and_alternates():
    method = make("rolora")
    trained = [method.downlink(play(method, n), SMALL).train for n in range(4)]
    assert trained == ["B", "A", "B", "A"]


N = sum(sum(s) * SMALL.lora.rank(m) for m, s in SHAPES.items())
OUT = sum(s[0] * SMALL.lora.rank(m) for m, s in SHAPES.items())
ENTRIES = sum(a * b for a, b in SHAPES.values())


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("flexlora", N, N),
        ("flexlora-memory", N, N),
        ("hetlora", N, N),
        ("rbla", N, N),
        ("raflora", N, N),
        ("flora", N, ENTRIES),  # two rounds of stacks are already more than these matrices
        ("ffa-lora", OUT, OUT),
        ("rolora", OUT, N),
        ("fedsa-lora", N - OUT, N - OUT),
        ("full", ENTRIES, ENTRIES),
    ],
)
def test_floats_up_and_down(name, up, down):
    method = build(name)
    payload = method.downlink(play(method, 2), SMALL)
    assert (floats_up(payload), floats_down(payload)) == (up, down)


def test_methods_for_one_rank_refuse_two():
    for name in ("fedavg", "fedit", "fedex-lora"):
        method = build(name)
        assert not method.mixed_ranks
        with pytest.raises(ValueError, match=r"module 'q'.*ranks \[2, 4\]"):
            play(method, 1, MIXED)
        play(method, 1, EQUAL)
