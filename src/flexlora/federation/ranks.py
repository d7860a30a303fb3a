"""Who gets which rank: the paper's distributions, and any other mixture of resources.

The paper (Bai et al., arXiv 2402.11505) gives its clients one of four LoRA types. With all seven
linear layers of its 1.3B model as targets, they are

| type | ranks                            | trainable share |
|------|----------------------------------|-----------------|
| 1    | 8 everywhere                     | 0.55 %          |
| 2    | 30 everywhere                    | 2.05 %          |
| 3    | 30 attention, 200 feed-forward   | 8.22 %          |
| 4    | 200 everywhere                   | 12.2 %          |

and these are their shares, in %, for types 1 / 2 / 3 / 4:

| distribution         | shares                        | note                                      |
|----------------------|-------------------------------|-------------------------------------------|
| `uniform`            | 25 / 25 / 25 / 25             |                                           |
| `heavy-tail-light`   | 80 / 5 / 5 / 10               | the release's README says 85 % smallest   |
| `heavy-tail-strong`  | 5 / 5 / 10 / 80               | its README says 85 % largest              |
| `normal`             | 5.75 / 44.25 / 44.25 / 5.75   | normal density, mean 2.5, sd 0.7          |
| `normal-as-released` | 5.75 / 5.75 / 44.25 / 44.25   | the release's code: density on its labels |
| `homogeneous`        | 100 / 0 / 0 / 0               | everyone at the smallest rank             |
| `extreme-heavy-tail` | all but one / 0 / 0 / one     | one client at the largest rank            |

The honest alternatives to a mixed plan are written with its name: `mean-of-heavy-tail-light` gives
everybody its mean rank, `highest-of-...` its largest, and `strong-of-...` leaves out the clients
that it gives the smallest. `by-size` gives the clients with most data the largest types, in equal
groups; `by-category` gives each category of tasks one type, in turn.
"""

from __future__ import annotations

import difflib
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flexlora.adapter import stable_seed

Ranks = int | Mapping[str, int]
"""One rank for all modules, or module pattern -> rank: what `LoraSpec.r` takes."""

ATTENTION = r"(.*\.)?([qkvo]|qkv|out)_proj|.*attn.*"
FEED_FORWARD = r"(.*\.)?(gate|up|down|gate_up)_proj|.*mlp.*"

PAPER_TYPES: tuple[Ranks, ...] = (8, 30, {ATTENTION: 30, FEED_FORWARD: 200}, 200)

FOUR_TYPES = {
    "heavy-tail-light": (0.80, 0.05, 0.05, 0.10),
    "heavy-tail-strong": (0.05, 0.05, 0.10, 0.80),
    "normal-as-released": (0.0575, 0.0575, 0.4425, 0.4425),
}
ANY_TYPES = ("uniform", "normal", "homogeneous", "extreme-heavy-tail")
BETWEEN = {"power-law": 2.0, "log-uniform": 1.0}
DATA = ("by-size", "by-category")
INSTEAD = ("mean-of-", "highest-of-", "strong-of-")
NAMES = (*ANY_TYPES, *FOUR_TYPES, *BETWEEN, *DATA)


@dataclass(frozen=True)
class PowerLaw:
    """Every whole rank from `low` to `high`, rank r with a share proportional to `r^-exponent`.

    `exponent=1` is log-uniform: as many clients from 4 to 8 as from 8 to 16.
    """

    low: int
    high: int
    exponent: float = 2.0


@dataclass(frozen=True)
class About:
    """What is known of a client's data when ranks are dealt."""

    num_examples: int
    category: str = ""


Plan = int | str | PowerLaw | Sequence[Ranks] | Mapping[int, float] | Mapping[str, Ranks]


def assign(
    client_ids: Sequence[str],
    plan: Plan,
    seed: int,
    types: Sequence[Ranks] = PAPER_TYPES,
    about: Mapping[str, About] | None = None,
) -> dict[str, Ranks]:
    """A rank for every client, in the order of `client_ids`; `strong-of-` plans leave some out.

    Shares become counts by largest remainder (ties to the smaller rank), and a shuffle that depends
    on `seed` and the ids, not on their order, decides who gets which. The largest type with a share
    above 0 gets at least one client, taken from the most frequent type, if there are two clients or
    more: a mixture whose large ranks nobody holds is another experiment.

    Args:
        client_ids: who there is.
        plan: a number (everyone); a distribution by name over `types`; `power-law` or
            `log-uniform` (every rank between the first and the last of `types`); a
            :class:`PowerLaw`; a mixture `{rank: share}`; a list, one entry per client in their
            order; `{client id: ranks}`; or `{module pattern: rank}` for everyone.
        seed: the run's seed.
        types: from small to large; for small models for example `[4, 8, 16, 32]`.
        about: every client's data, for plans that follow it.

    Raises:
        ValueError: what is wrong with the plan, and for an unknown name the nearest known one.

    >>> ids = [f"c{i:02}" for i in range(16)]
    >>> count(assign(ids, "heavy-tail-light", seed=0))
    {'8': 13, '30': 1, '30/200': 1, '200': 1}
    >>> count(assign(ids, {8: 0.8, 32: 0.2}, seed=0))
    {'8': 13, '32': 3}
    """
    if not client_ids or len(set(client_ids)) != len(client_ids):
        raise ValueError(f"ranks: {len(client_ids)} client ids; expected some, each once.")
    ranks = _one_each(client_ids, plan, seed, types, about or {})
    for client, r in ranks.items():
        values = r.values() if isinstance(r, Mapping) else [r]
        if not values or any(type(v) is not int or v < 1 for v in values):
            raise ValueError(f"ranks: {r!r} for client {client!r}; expected whole numbers from 1.")
    return ranks


def _one_each(
    client_ids: Sequence[str],
    plan: Plan,
    seed: int,
    types: Sequence[Ranks],
    about: Mapping[str, About],
) -> dict[str, Ranks]:
    if isinstance(plan, int):
        return dict.fromkeys(client_ids, plan)
    if isinstance(plan, str) and plan.startswith(INSTEAD):
        kind, _, name = plan.partition("-of-")
        return _instead(kind, assign(client_ids, name, seed, types, about))
    if plan in DATA:
        return _by_data(client_ids, str(plan), seed, types, about)
    if isinstance(plan, str):
        return _named(client_ids, plan, seed, types)
    if isinstance(plan, PowerLaw):
        return _deal(client_ids, _power_law(plan, len(client_ids)), seed)
    if isinstance(plan, Mapping):
        return _mapping(client_ids, plan, seed)
    if len(plan) != len(client_ids):
        raise ValueError(
            f"ranks: a list of {len(plan)} for {len(client_ids)} clients; expected one entry each."
        )
    return dict(zip(client_ids, plan, strict=True))


def _named(
    client_ids: Sequence[str], name: str, seed: int, types: Sequence[Ranks]
) -> dict[str, Ranks]:
    n, sizes = len(types), [_mean(t) for t in types]
    if not types or sizes != sorted(sizes):
        raise ValueError(f"ranks: types {[label(t) for t in types]}; expected small to large.")
    if name in BETWEEN:
        law = PowerLaw(round(sizes[0]), round(sizes[-1]), BETWEEN[name])
        return _deal(client_ids, _power_law(law, len(client_ids)), seed)
    if name == "homogeneous":
        shares: Sequence[float] = [1.0] + [0.0] * (n - 1)
    elif name == "uniform":
        shares = [1 / n] * n
    elif name == "normal":
        density = [math.exp(-(((i - (n - 1) / 2) / 0.7) ** 2) / 2) for i in range(n)]
        shares = [d / sum(density) for d in density]
    elif name == "extreme-heavy-tail":
        share = 1 / len(client_ids)
        shares = [1 - share] + [0.0] * (n - 2) + [share] if n > 1 else [1.0]
    elif name in FOUR_TYPES:
        shares = FOUR_TYPES[name]
        if n != len(shares):
            raise ValueError(
                f"ranks: {name!r} is defined for 4 types, got {n}: {[label(t) for t in types]}. "
                "Give 4 types, or a mixture {rank: share}."
            )
    else:
        nearest = difflib.get_close_matches(name, NAMES, 1, 0.0)[0]
        raise ValueError(
            f"ranks: unknown distribution {name!r}; did you mean {nearest!r}? "
            f"Known: {', '.join(NAMES)}."
        )
    return _deal(client_ids, _repeat(types, shares, len(client_ids)), seed)


def _instead(kind: str, dealt: Mapping[str, Ranks]) -> dict[str, Ranks]:
    """What one would do without mixed ranks: everyone at the mean, at the top, or fewer clients."""
    sizes = {c: _mean(r) for c, r in dealt.items()}
    if kind == "mean":
        return dict.fromkeys(dealt, max(1, round(sum(sizes.values()) / len(sizes))))
    if kind == "highest":
        return dict.fromkeys(dealt, max(dealt.values(), key=_mean))
    smallest = min(sizes.values())
    strong = {c: r for c, r in dealt.items() if sizes[c] > smallest}
    return strong or dict(dealt)


def _by_data(
    client_ids: Sequence[str],
    plan: str,
    seed: int,
    types: Sequence[Ranks],
    about: Mapping[str, About],
) -> dict[str, Ranks]:
    missing = [c for c in client_ids if c not in about]
    if missing:
        raise ValueError(f"ranks: {plan!r} needs to know every client's data; not {missing[:3]}.")
    if plan == "by-size":
        order = sorted(client_ids, key=lambda c: (about[c].num_examples, c))
        type_of = {c: types[i * len(types) // len(order)] for i, c in enumerate(order)}
        return {c: type_of[c] for c in client_ids}
    names = sorted({about[c].category for c in client_ids})
    random.Random(stable_seed(seed, "ranks")).shuffle(names)
    turn = {name: types[i % len(types)] for i, name in enumerate(names)}
    return {c: turn[about[c].category] for c in client_ids}


def _mapping(
    client_ids: Sequence[str], plan: Mapping[int, float] | Mapping[str, Ranks], seed: int
) -> dict[str, Ranks]:
    """A mapping is read by what it holds: shares, clients, or module patterns."""
    if not plan:
        raise ValueError("ranks: an empty mapping; expected shares, clients or module patterns.")
    if any(isinstance(v, float) for v in plan.values()):
        shares = {r: float(v) for r, v in plan.items() if not isinstance(v, Mapping)}
        if not abs(sum(shares.values()) - 1) <= 1e-6 or min(shares.values()) < 0:
            raise ValueError(f"ranks: mixture {dict(plan)}; expected shares that sum to 1.")
        levels = sorted(r for r in shares if isinstance(r, int))
        if len(levels) != len(plan):
            raise ValueError(f"ranks: mixture {dict(plan)}; expected whole numbers as ranks.")
        each = _repeat(levels, [shares[r] for r in levels], len(client_ids))
        return _deal(client_ids, each, seed)
    explicit: dict[str, Ranks] = {
        str(k): v if isinstance(v, Mapping) else int(v) for k, v in plan.items()
    }
    if explicit.keys() & set(client_ids) or all(isinstance(k, int) for k in plan):
        missing = sorted(set(client_ids) - explicit.keys())
        extra = sorted(explicit.keys() - set(client_ids))
        if missing or extra:
            raise ValueError(
                f"ranks: a rank per client must name each client once: {len(missing)} missing "
                f"{missing[:3]}, {len(extra)} unknown {extra[:3]}."
            )
        return {c: explicit[c] for c in client_ids}
    patterns = {k: v for k, v in explicit.items() if isinstance(v, int)}
    if len(patterns) != len(explicit):
        raise ValueError(f"ranks: {sorted(explicit)[:3]} names no client; ids: {client_ids[:3]}.")
    return dict.fromkeys(client_ids, patterns)


def _repeat(types: Sequence[Ranks], shares: Sequence[float], clients: int) -> list[Ranks]:
    """Each type as often as its share says: largest remainder, ties to the smaller type."""
    quotas = [share * clients for share in shares]
    counts = [math.floor(q + 1e-9) for q in quotas]
    order = sorted(range(len(types)), key=lambda i: (-round(quotas[i] - counts[i], 9), i))
    for i in order[: clients - sum(counts)]:
        counts[i] += 1
    largest = max(i for i, share in enumerate(shares) if share > 0)
    if counts[largest] == 0 and clients > 1:
        counts[counts.index(max(counts))] -= 1
        counts[largest] = 1
    return [t for t, c in zip(types, counts, strict=True) for _ in range(c)]


def _power_law(law: PowerLaw, clients: int) -> list[Ranks]:
    """Ranks at the mid-quantiles of the law, so that few clients still span it."""
    if not 1 <= law.low <= law.high:
        raise ValueError(f"ranks: {law}; expected 1 <= low <= high.")
    levels = range(law.low, law.high + 1)
    weights = [r**-law.exponent for r in levels]
    total, below, each = sum(weights), 0.0, list[Ranks]()
    for rank, weight in zip(levels, weights, strict=True):
        below += weight / total
        while len(each) < clients and (len(each) + 0.5) / clients <= below + 1e-12:
            each.append(rank)
    return each


def _deal(client_ids: Sequence[str], each: list[Ranks], seed: int) -> dict[str, Ranks]:
    random.Random(stable_seed(seed, "ranks")).shuffle(each)
    dealt = dict(zip(sorted(client_ids), each, strict=True))
    return {c: dealt[c] for c in client_ids}


def _mean(r: Ranks) -> float:
    return sum(r.values()) / len(r) if isinstance(r, Mapping) else r


def label(r: Ranks) -> str:
    """A type as people read it: `8`, or `30/200` for ranks that depend on the module."""
    return "/".join(map(str, r.values())) if isinstance(r, Mapping) else str(r)


def count(assigned: Mapping[str, Ranks] | Iterable[tuple[str, Ranks]]) -> dict[str, int]:
    """Clients per type, from small to large: what a plan prints."""
    ranks = list(dict(assigned).values())
    counted = Counter(label(r) for r in sorted(ranks, key=_mean))
    return dict(counted)
