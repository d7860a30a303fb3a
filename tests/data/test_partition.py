"""Every row in exactly one client, whatever the scheme; the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexlora.data.partition import by_column, dirichlet, iid, skewed
from flexlora.data.tabular import Sharing, share

SEEDS = st.integers(0, 1000)


def complete(parts, rows):
    """Every row once, each client's ascending."""
    assert all((np.diff(p) > 0).all() for p in parts.values())
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(rows))


@st.composite
def rows_and_clients(draw):
    clients = draw(st.integers(1, 20))
    return draw(st.integers(clients, 300)), clients


@given(rows_and_clients(), SEEDS)
def test_iid_sizes_differ_by_one(shape, seed):
    parts = iid(*shape, seed=seed)
    complete(parts, shape[0])
    sizes = [len(p) for p in parts.values()]
    assert len(sizes) == shape[1]
    assert max(sizes) - min(sizes) <= 1


@given(rows_and_clients(), st.sampled_from(["lognormal", "zipf"]), st.floats(0, 4), SEEDS)
def test_skewed_leaves_nobody_empty(shape, distribution, exponent, seed):
    parts = skewed(*shape, distribution, exponent, seed)
    complete(parts, shape[0])
    assert len(parts) == shape[1]
    assert min(map(len, parts.values())) >= 1


@given(st.lists(st.sampled_from("abcde"), min_size=40, max_size=200), st.floats(0.3, 50), SEEDS)
def test_dirichlet_gives_everybody_the_minimum(labels, alpha, seed):
    parts = dirichlet(labels, 3, alpha, seed, min_rows=2, attempts=1000)
    complete(parts, len(labels))
    assert min(map(len, parts.values())) >= 2


@given(st.lists(st.text(max_size=2), min_size=1, max_size=100))
def test_by_column_groups_equal_values(values):
    parts = by_column(values)
    complete(parts, len(values))
    assert all({values[r] for r in rows} == {name} for name, rows in parts.items())


@given(st.integers(1, 200), st.floats(0, 0.5), st.floats(0, 0.49), SEEDS)
def test_sharing_keeps_every_row_and_something_to_train_on(rows, held, test, seed):
    parts = share(np.arange(rows), "a", Sharing(held, test, seed))
    complete(parts, rows)
    assert len(parts["train"]) >= 1


def test_the_seed_decides():
    labels = ["a", "b"] * 100
    for scheme in (
        lambda seed: iid(200, 4, seed),
        lambda seed: skewed(200, 4, seed=seed),
        lambda seed: dirichlet(labels, 4, 1.0, seed),
    ):
        one, same, other = ([rows.tolist() for rows in scheme(seed).values()] for seed in (1, 1, 2))
        assert one == same != other


def test_alpha_sets_how_unequal_the_labels_are():
    labels = ["a"] * 1000 + ["b"] * 1000

    def skew(alpha):
        parts = dirichlet(labels, 10, alpha, min_rows=5).values()
        return np.mean([abs(np.mean(rows < 1000) - 0.5) for rows in parts])

    assert skew(0.3) > 0.25 > 0.1 > skew(100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iid(3, 4), "partition.clients: 4; expected 1 to 3"),
        (lambda: iid(3, 0), "partition.clients: 0"),
        (lambda: skewed(9, 3, "pareto"), "'pareto'; expected 'lognormal' or 'zipf'"),
        (lambda: skewed(9, 3, shape=-1), "partition.shape: -1"),
        (lambda: dirichlet(["a"] * 9, 3, 0), "partition.alpha: 0"),
        (lambda: dirichlet(["a"] * 9, 10, 1), "partition.clients: 10"),
        (lambda: dirichlet(["a"] * 9, 3, 1, min_rows=4), "no draw of 100.*Raise alpha"),
        (lambda: Sharing(0.5, 0.5), "sum is below 1"),
    ],
)
def test_impossible_partitions_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
