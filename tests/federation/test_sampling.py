import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.federation.sampling import cohort, coverage

IDS = [f"c{i:03}" for i in range(60)]


@settings(deadline=None)
@given(st.integers(0, 10), st.integers(1, 50), st.integers(1, 60), st.floats(0, 0.9))
def test_a_cohort_is_a_pure_function_without_repeats(seed, round, size, drop_out):
    invited = cohort(seed, round, IDS, size)
    present = cohort(seed, round, IDS, size, drop_out)
    assert len(set(invited)) == size
    assert list(invited) == sorted(invited)
    assert set(present) <= set(invited)
    assert present == cohort(seed, round, IDS, size, drop_out)


def test_the_run_seed_and_the_round_matter():
    assert cohort(1, 1, IDS, 10) != cohort(2, 1, IDS, 10)
    assert cohort(1, 1, IDS, 10) != cohort(1, 2, IDS, 10)


def test_clients_and_drop_outs_are_uniform():
    visits = dict.fromkeys(IDS, 0)
    for round in range(1, 2001):
        for client in cohort(0, round, IDS, 12, drop_out=0.25):
            visits[client] += 1
    assert sum(visits.values()) == pytest.approx(2000 * 12 * 0.75, rel=0.01)
    # 2,000 draws of probability 0.15: standard deviation 16; five of them for 60 clients.
    assert all(abs(v - 300) < 80 for v in visits.values())


def test_a_hundred_thousand_clients_are_cheap():
    people = [str(i) for i in range(100_000)]
    began = time.perf_counter()
    for round in range(1, 101):
        cohort(0, round, people, 80)
    assert time.perf_counter() - began < 1.0


def test_coverage_counts_what_the_cohorts_visit():
    seen = [c for r in range(1, 8) for c in cohort(5, r, IDS, 9, 0.2)]
    found = coverage(5, 7, IDS, 9, 0.2)
    assert (found.registered, found.sampled) == (60, len(set(seen)))
    assert found.mean_visits == pytest.approx(len(seen) / 60)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 1, IDS, 61), "size 61 of 60 registered"),
        ((0, 1, IDS, 0), "size 0"),
        ((0, 0, IDS, 3), "rounds count from 1"),
        ((0, 1, IDS, 3, 1.0), "drop_out 1.0"),
        ((0, 1, IDS, 3, float("nan")), "drop_out nan"),
    ],
)
def test_bad_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        cohort(*arguments)
