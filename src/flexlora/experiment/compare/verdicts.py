"""What a comparison's numbers allow one to say: verdicts against the reference, and budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from flexlora.experiment.compare.grid import Arm, Comparison
from flexlora.experiment.compare.results import (
    BETTER_LOW,
    Result,
    at_bytes,
    categories,
    curve,
    final,
)
from flexlora.experiment.compare.statistics import Effect, Scores, effect, holm

Chosen = Mapping[Arm, Mapping[int, Result]]
Reading = Callable[[Result], dict[str, float]]
"""One cell's score per client."""


@dataclass(frozen=True)
class Verdict:
    """One arm against the reference.

    Attributes:
        arm: which.
        effect: arm minus reference; for the loss, below 0 is better.
        p: of no difference, after Holm's adjustment; None without a test.
        p_margin: of a difference beyond the margin, adjusted likewise.
        said: the conclusion in words.
    """

    arm: Arm
    effect: Effect
    p: float | None
    p_margin: float | None
    said: str


def primary_group(chosen: Chosen) -> str:
    """The unseen clients where there are any: generalisation is the question."""
    cells = [r for seeds in chosen.values() for r in seeds.values()]
    return "unseen" if any(final(r, "global", "unseen", "loss") for r in cells) else "seen"


def table(cells: Mapping[int, Result], reading: Reading) -> Scores:
    """Seed -> client -> score of one arm, without seeds that have none."""
    return {seed: values for seed, cell in cells.items() if (values := reading(cell))}


def verdicts(comparison: Comparison, chosen: Chosen, reading: Reading) -> list[Verdict]:
    """Every arm against the reference, which is the first; Holm over all of them."""
    if not chosen:
        return []
    reference, *others = chosen
    category = categories(r for seeds in chosen.values() for r in seeds.values())
    base, effects = table(chosen[reference], reading), dict[Arm, Effect]()
    for arm in others:
        scores = table(chosen[arm], reading)
        if any(base.get(s, {}).keys() & row.keys() for s, row in scores.items()):
            effects[arm] = effect(scores, base, category)
    tested = [arm for arm, found in effects.items() if found.error is not None]
    differ = holm([effects[a].p_difference() or 0.0 for a in tested])
    alike = holm([effects[a].p_equivalence(comparison.margin) or 0.0 for a in tested])
    p, p_margin = (dict(zip(tested, values, strict=True)) for values in (differ, alike))
    return [
        Verdict(
            arm,
            found,
            p.get(arm),
            p_margin.get(arm),
            in_words(comparison, arm, reference, found, p.get(arm), p_margin.get(arm)),
        )
        for arm, found in effects.items()
    ]


def in_words(
    comparison: Comparison,
    arm: Arm,
    reference: Arm,
    found: Effect,
    p: float | None,
    p_margin: float | None,
) -> str:
    """A conclusion, or why there is none."""
    if p is None or p_margin is None:
        return f"no conclusion: {found.why_not}"
    low, high = found.interval() or (0.0, 0.0)
    span = f"difference {found.mean:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}"
    small = p_margin < comparison.alpha
    if p < comparison.alpha:
        better = (found.mean < 0) == (comparison.metric in BETTER_LOW)
        word = "better" if better else "worse"
        tail = f", by less than the margin of {comparison.margin:g}" if small else ""
        return f"{arm} is {word} than {reference}{tail} ({span})"
    if small:
        return f"no difference larger than {comparison.margin:g} to {reference} ({span})"
    return f"not settled: {span}"


def byte_budget(chosen: Chosen, group: str, metric: str) -> int:
    """What the thriftiest arm uploads in all, or what every arm needs for its first evaluation."""
    federated = [r for cells in chosen.values() for r in cells.values() if not r.about["bound"]]
    first = [
        next((p.bytes_up for p in curve(r.metrics, group, metric) if p.round), 0) for r in federated
    ]
    return max([min((r.about["bytes_up"] for r in federated), default=0), *first])


def at_equal_bytes(chosen: Chosen, group: str, metric: str) -> dict[Arm, float]:
    """Mean score of each arm at the common budget of uploaded bytes, on the `eval` split."""
    budget, found = byte_budget(chosen, group, metric), dict[Arm, float]()
    for arm, cells in chosen.items():
        read = table(cells, lambda r: at_bytes(r, budget, group, metric))
        if read and not any(r.about["bound"] for r in cells.values()):
            found[arm] = fmean(fmean(row.values()) for row in read.values())
    return found


def at_equal_memory(chosen: Chosen, means: Mapping[Arm, float], metric: str) -> dict[int, Arm]:
    """Peak client memory, in bytes -> the arm with the best mean that needs no more than that.

    Only memories at which another arm becomes the best.
    """
    need = {
        arm: max(r.peak_bytes for r in cells.values())
        for arm, cells in chosen.items()
        if arm in means and not any(r.about["bound"] for r in cells.values())
    }
    pick, found = min if metric in BETTER_LOW else max, dict[int, Arm]()
    for budget in sorted(set(need.values())):
        best = pick((a for a, b in need.items() if b <= budget), key=lambda a: means[a])
        if best not in found.values():
            found[budget] = best
    return found


def spread(chosen: Chosen, reading: Reading) -> tuple[float, float] | None:
    """Standard deviation of paired differences between seeds and between clients, pooled.

    None with fewer than two seeds in common anywhere.
    """
    reference, *others = chosen
    base, by_seed, by_client = table(chosen[reference], reading), list[float](), list[float]()
    for arm in others:
        scores, rows = table(chosen[arm], reading), []
        for s in base.keys() & scores.keys():
            row = [scores[s][c] - base[s][c] for c in base[s].keys() & scores[s].keys()]
            rows += [row] if len(row) > 1 else []
        if len(rows) > 1:
            by_seed.append(stdev(fmean(row) for row in rows))
            by_client += [stdev(row) for row in rows]
    if not by_seed:
        return None
    return _pooled(by_seed), _pooled(by_client)


def _pooled(deviations: Sequence[float]) -> float:
    return sqrt(fmean(d * d for d in deviations))


def to_json(v: Verdict) -> dict[str, Any]:
    """A verdict as plain data."""
    return {
        "arm": str(v.arm),
        "difference": v.effect.mean,
        "interval": v.effect.interval(),
        "p": v.p,
        "p_margin": v.p_margin,
        "seeds": v.effect.seeds,
        "clients": v.effect.clients,
        "said": v.said,
    }
