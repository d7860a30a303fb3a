"""Whether two arms of a comparison differ, from scores per seed and client.

Everything is about paired differences: the same client under the same seed, once with either arm.
Seeds are few and clients share categories, so neither may be taken for many independent numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

FEWEST_SEEDS = 3
FEWEST_CLIENTS = 6
RESAMPLES = 2000
POWER = 0.8

Scores = Mapping[int, Mapping[str, float]]
"""Seed -> client -> score."""


@dataclass(frozen=True)
class Effect:
    """A mean paired difference and how well it is known.

    Attributes:
        mean: over seeds, then over clients, each counting once.
        error: its standard error, None where nothing can be said.
        seeds: that both arms have.
        clients: that both arms have, in any seed.
        why_not: why no test was computed, or empty.
    """

    mean: float
    error: float | None
    seeds: int
    clients: int
    why_not: str = ""

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Confidence interval with `seeds - 1` degrees of freedom."""
        if self.error is None:
            return None
        half = t_quantile((1 + level) / 2, self.seeds - 1) * self.error
        return self.mean - half, self.mean + half

    def p_difference(self) -> float | None:
        """Two-sided p-value of no difference."""
        if self.error is None:
            return None
        return min(1.0, 2 * t_tail(_ratio(abs(self.mean), self.error), self.seeds - 1))

    def p_equivalence(self, margin: float) -> float | None:
        """p-value of a difference of `margin` or more, either way (two one-sided tests)."""
        if self.error is None:
            return None
        return t_tail(_ratio(margin - abs(self.mean), self.error), self.seeds - 1)


def effect(a: Scores, b: Scores, category: Mapping[str, str], seed: int = 0) -> Effect:
    """The paired difference `a - b`, its error by a hierarchical bootstrap.

    Seeds are drawn with replacement, then categories, then the clients of each drawn category; one
    draw of clients serves all drawn seeds, because the same clients are seen under every seed
    (Owen, The pigeonhole bootstrap, 2007, arXiv 0712.1111: its variance is never too small by more
    than a term of order 1 / seeds). The bootstrap's variance is scaled by `seeds / (seeds - 1)`,
    for with 3 seeds it would be a third too small, and meets Student's t, not a percentile: with
    so few seeds percentiles reject far too often.

    Args:
        a: scores of one arm.
        b: scores of the other.
        category: of every client.
        seed: of the resampling.

    Raises:
        ValueError: the arms share no seed and client.

    >>> a = {s: {f"c{i}": 1.0 + i + s for i in range(8)} for s in range(3)}
    >>> b = {s: {c: v + 0.5 for c, v in row.items()} for s, row in a.items()}
    >>> found = effect(a, b, {f"c{i}": "x" for i in range(8)})
    >>> found.mean, found.p_difference() < 1e-6
    (-0.5, True)
    """
    seeds = sorted(a.keys() & b.keys())
    clients = sorted({c for s in seeds for c in a[s].keys() & b[s].keys()})
    if not clients:
        raise ValueError("the two arms share no seed and client, so nothing can be compared.")
    table = np.full((len(seeds), len(clients)), np.nan)
    for i, s in enumerate(seeds):
        for j, c in enumerate(clients):
            if c in a[s] and c in b[s]:
                table[i, j] = a[s][c] - b[s][c]
    mean = float(np.nanmean(np.nanmean(table, axis=1)))
    why_not = too_few(len(seeds), len(clients))
    if why_not:
        return Effect(mean, None, len(seeds), len(clients), why_not)
    means = _resampled(table, [category.get(c, "") for c in clients], seed)
    error = math.sqrt(float(means.var(ddof=1)) * len(seeds) / (len(seeds) - 1))
    return Effect(mean, error, len(seeds), len(clients))


def too_few(seeds: int, clients: int) -> str:
    """Why nothing can be concluded, or an empty string.

    >>> too_few(2, 40)
    '2 seeds; a conclusion takes at least 3'
    """
    if seeds < FEWEST_SEEDS:
        return f"{seeds} seed{'s' * (seeds != 1)}; a conclusion takes at least {FEWEST_SEEDS}"
    if clients < FEWEST_CLIENTS:
        return f"{clients} clients; a test takes at least {FEWEST_CLIENTS}"
    return ""


def _resampled(
    table: Float[NDArray[np.float64], "seeds clients"], categories: Sequence[str], seed: int
) -> Float[NDArray[np.float64], " resamples"]:
    """The mean under `RESAMPLES` draws of seeds, categories and clients."""
    rng = np.random.default_rng(seed)
    n, k = table.shape
    seeds = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)
    groups: dict[str, list[int]] = {}
    for j, name in enumerate(categories):
        groups.setdefault(name, []).append(j)
    drawn = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), RESAMPLES)
    clients = np.zeros((RESAMPLES, k))
    for times, members in zip(drawn.T, groups.values(), strict=True):
        size = len(members)
        clients[:, members] = rng.multinomial(times * size, np.full(size, 1 / size))
    present = ~np.isnan(table)
    values = np.where(present, table, 0.0)
    weight = ((seeds @ present) * clients).sum(1)
    total = ((seeds @ values) * clients).sum(1)
    drawn_any = weight > 0
    means: NDArray[np.float64] = total[drawn_any] / weight[drawn_any]
    return means


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: comparing these with alpha bounds the chance of any false claim.

    Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 1979.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for step, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - step) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def smallest_detectable(
    seeds: int, clients: int, spread: tuple[float, float], comparisons: int = 1, alpha: float = 0.05
) -> float | None:
    """The difference that a test at `alpha`, divided by the comparisons, finds 4 times in 5.

    `(t_(1 - alpha/2m) + t_(0.8)) sqrt(sd_seed^2 / seeds + sd_client^2 / clients)`, with `seeds - 1`
    degrees of freedom; None with too few of either.

    Args:
        seeds: per arm.
        clients: evaluated in each.
        spread: standard deviation of paired differences between seeds, and between clients.
        comparisons: `m`, what Holm divides alpha by at its first step.
        alpha: chance of any false claim.
    """
    if too_few(seeds, clients):
        return None
    error = math.hypot(spread[0] / math.sqrt(seeds), spread[1] / math.sqrt(clients))
    df = seeds - 1
    return (t_quantile(1 - alpha / (2 * comparisons), df) + t_quantile(POWER, df)) * error


def _ratio(value: float, error: float) -> float:
    """`value / error`, where an error of 0 (arms that differ by a constant) settles it."""
    if error > 0:
        return value / error
    return 0.0 if value == 0 else math.copysign(math.inf, value)


def t_tail(t: float, df: int) -> float:
    """`P(T > t)` of Student's t with a whole number of degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.

    >>> round(t_tail(4.3027, 2), 4), round(t_tail(-2.0, 4), 4)
    (0.025, 0.9419)
    """
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    angle = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    if df % 2:
        series = _series(cosine**2, (df - 1) // 2, 2)
        inside = 2 / math.pi * (angle + sine * cosine * series)
    else:
        inside = sine * _series(cosine**2, df // 2, 1)
    return (1 - inside) / 2


def _series(x: float, terms: int, first: int) -> float:
    """`1 + f/(f+1) x + f/(f+1) (f+2)/(f+3) x^2 + ...`."""
    term, total = 1.0, 0.0
    for k in range(first, first + 2 * terms, 2):
        total += term
        term *= x * k / (k + 1)
    return total


def t_quantile(p: float, df: int) -> float:
    """The t with `P(T <= t) = p`, by bisection.

    >>> round(t_quantile(0.975, 2), 4)
    4.3027
    """
    low, high = -1e6, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - t_tail(middle, df) < p else (low, middle)
    return (low + high) / 2
