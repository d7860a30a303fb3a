"""The tests behind a comparison's conclusions, on scores whose truth is known."""

import math

import numpy as np
import pytest

from flexlora.experiment.compare.statistics import (
    effect,
    holm,
    smallest_detectable,
    t_quantile,
    t_tail,
    too_few,
)

CLIENTS = [f"c{i:02}" for i in range(30)]
CATEGORY = {c: f"k{i % 6}" for i, c in enumerate(CLIENTS)}


def simulated(rng, seeds, shift=0.0, between=(0.03, 0.03, 0.1)):
    """An arm's scores: clients differ, seeds differ, categories and clients differ per seed."""
    own = {c: 2 + 0.5 * math.sin(i) for i, c in enumerate(CLIENTS)}
    scores = {}
    for s in seeds:
        of_seed = rng.normal(0, between[0])
        of_category = {k: rng.normal(0, between[1]) for k in set(CATEGORY.values())}
        scores[s] = {
            c: own[c] + shift + of_seed + of_category[CATEGORY[c]] + rng.normal(0, between[2])
            for c in CLIENTS
        }
    return scores


def false_claims(seeds, between):
    rng = np.random.default_rng(seeds)
    arms = [[simulated(rng, range(seeds), between=between) for _ in range(2)] for _ in range(100)]
    return sum(effect(a, b, CATEGORY).p_difference() < 0.05 for a, b in arms)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("between", [(0.03, 0.03, 0.1), (0.0, 0.0, 0.1)])
def test_a_method_against_itself_differs_in_at_most_5_of_100(seeds, between):
    assert false_claims(seeds, between) <= 5


def test_where_only_seeds_vary_the_test_is_student_s():
    """Then it is exact, 5 in 100 on average; a percentile bootstrap would claim about 25."""
    assert false_claims(3, (0.1, 0.0, 0.001)) <= 10


def test_a_real_difference_is_found_and_its_size_lies_in_the_interval():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(20):
        a, b = simulated(rng, range(5), shift=-0.2), simulated(rng, range(5))
        found = effect(a, b, CATEGORY)
        low, high = found.interval()
        hits += low < -0.2 < high
        assert found.p_difference() < 0.05
        assert found.p_equivalence(0.02) > 0.5
    assert hits >= 18


def test_no_difference_larger_than_a_margin_is_a_result():
    rng = np.random.default_rng(1)
    between = (0.001, 0.001, 0.01)
    a, b = (simulated(rng, range(5), between=between) for _ in range(2))
    found = effect(a, b, CATEGORY)
    assert found.p_equivalence(0.02) < 0.05
    assert found.p_equivalence(1e-6) > 0.3


def test_one_odd_category_is_not_taken_for_many_clients():
    """Five clients of one category agree: as one piece of evidence, not as five."""
    rng = np.random.default_rng(2)
    b = simulated(rng, range(5), between=(0.0, 0.0, 0.001))
    a = {s: {c: v - 0.1 * (CATEGORY[c] == "k0") for c, v in row.items()} for s, row in b.items()}
    clustered = effect(a, b, CATEGORY)
    apart = effect(a, b, {c: c for c in CLIENTS})
    assert clustered.error > 1.3 * apart.error


def test_the_direct_formula_where_only_seeds_vary():
    shifts = {0: 0.1, 1: -0.05, 2: 0.02, 3: 0.08}
    b = {s: dict.fromkeys(CLIENTS, 1.0) for s in shifts}
    a = {s: dict.fromkeys(CLIENTS, 1.0 + d) for s, d in shifts.items()}
    found = effect(a, b, CATEGORY)
    values = np.array(list(shifts.values()))
    assert found.mean == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / 2, rel=0.05)


def test_clients_that_are_missing_in_a_seed_do_not_pair_with_others():
    a = {0: {"x": 1.0, "y": 5.0}, 1: {"x": 1.0}}
    b = {0: {"x": 0.0, "z": 9.0}, 1: {"x": 0.0}}
    found = effect(a, b, {})
    assert (found.mean, found.clients, found.error) == (1.0, 1, None)
    with pytest.raises(ValueError, match="share no seed"):
        effect({0: {"x": 1.0}}, {1: {"x": 1.0}}, {})


@pytest.mark.parametrize(("seeds", "clients"), [(1, 30), (2, 30), (5, 5)])
def test_too_few_is_said_and_not_computed(seeds, clients):
    rng = np.random.default_rng(0)
    some = CLIENTS[:clients]
    a, b = (
        {s: {c: row[c] for c in some} for s, row in simulated(rng, range(seeds)).items()}
        for _ in range(2)
    )
    found = effect(a, b, CATEGORY)
    assert found.p_difference() is found.p_equivalence(1.0) is found.interval() is None
    assert "takes at least" in found.why_not == too_few(seeds, clients)
    assert smallest_detectable(seeds, clients, (0.1, 0.1)) is None


def test_arms_that_differ_by_a_constant_are_settled():
    a = {s: dict.fromkeys(CLIENTS, 1.0) for s in range(3)}
    assert effect(a, a, CATEGORY).p_difference() == 1.0
    assert effect(a, a, CATEGORY).p_equivalence(0.01) == 0.0


def test_holm_by_hand():
    assert holm([]) == []
    assert holm([0.02]) == [0.02]
    assert holm([0.01, 0.02, 0.03, 0.5]) == pytest.approx([0.04, 0.06, 0.06, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_student_t_against_tables():
    for df, critical in {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622}.items():
        assert t_quantile(0.975, df) == pytest.approx(critical, abs=1e-3)
        assert t_tail(-critical, df) == pytest.approx(0.975, abs=1e-5)
    assert t_tail(math.inf, 3) == 0.0
    assert t_tail(0.0, 5) == 0.5


def test_the_smallest_detectable_effect_is_found_about_4_times_in_5():
    spread, seeds = (0.05, 0.1), 5
    least = smallest_detectable(seeds, len(CLIENTS), spread)
    rng, hits = np.random.default_rng(3), 0
    for _ in range(200):
        seed_part = rng.normal(0, spread[0], seeds)[:, None]
        d = least + seed_part + rng.normal(0, spread[1], (1, len(CLIENTS)))
        a = {s: dict(zip(CLIENTS, row, strict=True)) for s, row in enumerate(d)}
        b = {s: dict.fromkeys(CLIENTS, 0.0) for s in range(seeds)}
        hits += effect(a, b, {c: c for c in CLIENTS}).p_difference() < 0.05
    assert 0.65 < hits / 200 < 0.95
    assert smallest_detectable(5, 30, spread, comparisons=10) > least
    assert smallest_detectable(10, 30, spread) < least
