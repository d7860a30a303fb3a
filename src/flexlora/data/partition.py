"""One pooled data set into clients: pure functions of a seed over row numbers.

Each returns client name -> ascending rows, and every row is in exactly one client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from flexlora.adapter import stable_seed


def by_column(values: Sequence[str]) -> dict[str, Int[np.ndarray, " rows"]]:
    """One client for each distinct value, in order of first appearance.

    >>> {name: rows.tolist() for name, rows in by_column(["b", "a", "b"]).items()}
    {'b': [0, 2], 'a': [1]}
    """
    number = {name: i for i, name in enumerate(dict.fromkeys(values))}
    labels = np.fromiter((number[v] for v in values), dtype=np.int64, count=len(values))
    return dict(zip(number, _grouped(labels, len(number)), strict=True))


def iid(rows: int, clients: int, seed: int = 0) -> dict[str, Int[np.ndarray, " rows"]]:
    """Rows dealt at random; sizes differ by one at most.

    >>> [len(p) for p in iid(7, 3).values()]
    [3, 2, 2]

    Raises:
        ValueError: more clients than rows.
    """
    return _deal(rows, np.ones(max(clients, 0)), seed)


def skewed(
    rows: int,
    clients: int,
    distribution: Literal["lognormal", "zipf"] = "lognormal",
    shape: float = 1.0,
    seed: int = 0,
) -> dict[str, Int[np.ndarray, " rows"]]:
    """Rows dealt at random into clients of very different sizes, at least one row each.

    `lognormal`: sizes go as `exp(shape * z)`, `z` standard normal. `zipf`: the k-th largest as
    `1 / k^shape`; which client is the k-th is random. Shape 0 is equal sizes.

    >>> sorted(len(p) for p in skewed(100, 4, "zipf").values())
    [13, 16, 24, 47]

    Raises:
        ValueError: more clients than rows, a negative shape, an unknown distribution.
    """
    if shape < 0:
        raise ValueError(f"partition.shape: {shape}; expected 0 (equal sizes) or above.")
    generator = _generator(seed, "sizes")
    if distribution == "lognormal":
        weights = np.exp(shape * generator.standard_normal(max(clients, 0)))
    elif distribution == "zipf":
        weights = generator.permutation(np.arange(1, clients + 1, dtype=float) ** -shape)
    else:
        raise ValueError(
            f"partition.distribution: {distribution!r}; expected 'lognormal' or 'zipf'."
        )
    return _deal(rows, weights, seed)


def dirichlet(
    values: Sequence[str],
    clients: int,
    alpha: float,
    seed: int = 0,
    min_rows: int = 10,
    attempts: int = 100,
) -> dict[str, Int[np.ndarray, " rows"]]:
    """Label-skewed clients: each label is shared out by its own draw of `Dirichlet(alpha)`.

    Small `alpha` gives every label to few clients, large `alpha` approaches iid. Drawn again until
    every client has `min_rows` (Hsu, Qi and Brown, *Measuring the Effects of Non-Identical Data
    Distribution*, 2019, arXiv 1909.06335; the redraw is Li et al.'s, 2021, arXiv 2102.02079).

    Raises:
        ValueError: `alpha` not above 0, or no draw that gives every client `min_rows`.
    """
    if not alpha > 0:
        raise ValueError(
            f"partition.alpha: {alpha}; expected a number above 0 (1 is mild, 0.1 strong)."
        )
    if not 1 <= clients <= len(values):
        raise ValueError(f"partition.clients: {clients}; expected 1 to {len(values)}, the rows.")
    labels = list(by_column(values).values())
    for attempt in range(attempts):
        generator = _generator(seed, f"dirichlet {attempt}")
        owner = np.empty(len(values), dtype=np.int64)
        for rows in labels:
            counts = _apportion(len(rows), generator.dirichlet(np.full(clients, alpha)))
            owner[generator.permutation(rows)] = np.repeat(np.arange(clients), counts)
        if np.bincount(owner, minlength=clients).min() >= min_rows:
            return _named(_grouped(owner, clients))
    raise ValueError(
        f"partition: no draw of {attempts} gave each of {clients} clients {min_rows} of "
        f"{len(values)} rows at alpha {alpha}. Raise alpha, or lower clients or min_rows."
    )


def _deal(
    rows: int, weights: Float[np.ndarray, " clients"], seed: int
) -> dict[str, Int[np.ndarray, " rows"]]:
    clients = len(weights)
    if not 1 <= clients <= rows:
        raise ValueError(f"partition.clients: {clients}; expected 1 to {rows}, the number of rows.")
    sizes = 1 + _apportion(rows - clients, weights)
    order = _generator(seed, "rows").permutation(rows)
    return _named([np.sort(piece) for piece in np.split(order, np.cumsum(sizes)[:-1])])


def _apportion(total: int, weights: Float[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    """Whole numbers proportional to `weights` with sum `total`: largest remainders."""
    weights = np.asarray(weights, dtype=float)
    if weights.sum() <= 0 or not np.isfinite(weights).all():  # Dirichlet of a tiny alpha underflows
        weights = np.ones(len(weights))
    exact = total * weights / weights.sum()
    whole: Int[np.ndarray, " k"] = np.floor(exact).astype(np.int64)
    order = np.argsort(whole - exact, kind="stable")
    whole[order[: total - int(whole.sum())]] += 1
    return whole


def _grouped(labels: Int[np.ndarray, " rows"], count: int) -> list[Int[np.ndarray, " rows"]]:
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(1, count)))


def _named(parts: Sequence[Int[np.ndarray, " rows"]]) -> dict[str, Int[np.ndarray, " rows"]]:
    return {str(i): rows for i, rows in enumerate(parts)}


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng(stable_seed(seed, "partition", purpose))
