"""Rank plans by name: the paper's distributions, and others.

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
from collections.abc import Mapping, Sequence
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
INSTEAD = {
    "mean-of-": "everybody at the mean rank of that distribution",
    "highest-of-": "everybody at its largest rank",
    "strong-of-": "it, without the clients that get its smallest rank",
}
"""Prefix of a distribution's name -> what one would do without mixed ranks."""

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


def named(
    client_ids: Sequence[str], name: str, seed: int, types: Sequence[Ranks]
) -> dict[str, Ranks]:
    """What a distribution over types deals out.

    Raises:
        ValueError: an unknown name, or types that do not suit it.
    """
    n, sizes = len(types), [mean(t) for t in types]
    if not types or sizes != sorted(sizes):
        raise ValueError(f"types {[label(t) for t in types]}; expected small to large.")
    if name in BETWEEN:
        law = PowerLaw(round(sizes[0]), round(sizes[-1]), BETWEEN[name])
        return deal(client_ids, power_law(law, len(client_ids)), seed)
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
                f"{name!r} is defined for 4 types, got {n}: {[label(t) for t in types]}. "
                "Give 4 types, or a mixture {rank: share}."
            )
    else:
        close = difflib.get_close_matches(name, NAMES, 1, 0.0)[0]
        raise ValueError(
            f"unknown distribution {name!r}; did you mean {close!r}? Known: {', '.join(NAMES)}, "
            f"and any of these after {', '.join(INSTEAD)}."
        )
    return deal(client_ids, repeat(types, shares, len(client_ids)), seed)


def instead(kind: str, dealt: Mapping[str, Ranks]) -> dict[str, Ranks]:
    """What one would do without mixed ranks: everyone at the mean, at the top, or fewer clients."""
    sizes = {c: mean(r) for c, r in dealt.items()}
    if kind == "mean":
        return dict.fromkeys(dealt, max(1, round(sum(sizes.values()) / len(sizes))))
    if kind == "highest":
        return dict.fromkeys(dealt, max(dealt.values(), key=mean))
    smallest = min(sizes.values())
    strong = {c: r for c, r in dealt.items() if sizes[c] > smallest}
    return strong or dict(dealt)


def by_data(
    client_ids: Sequence[str],
    plan: str,
    seed: int,
    types: Sequence[Ranks],
    about: Mapping[str, About],
) -> dict[str, Ranks]:
    """The largest types to those with most data, or a type to each category in turn.

    Raises:
        ValueError: a client of whose data nothing is known.
    """
    missing = [c for c in client_ids if c not in about]
    if missing:
        raise ValueError(f"{plan!r} needs to know every client's data; not {missing[:3]}.")
    if plan == "by-size":
        order = sorted(client_ids, key=lambda c: (about[c].num_examples, c))
        type_of = {c: types[i * len(types) // len(order)] for i, c in enumerate(order)}
        return {c: type_of[c] for c in client_ids}
    names = sorted({about[c].category for c in client_ids})
    random.Random(stable_seed(seed, "ranks")).shuffle(names)
    turn = {name: types[i % len(types)] for i, name in enumerate(names)}
    return {c: turn[about[c].category] for c in client_ids}


def repeat(types: Sequence[Ranks], shares: Sequence[float], clients: int) -> list[Ranks]:
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


def power_law(law: PowerLaw, clients: int) -> list[Ranks]:
    """Ranks at the mid-quantiles of the law, so that few clients still span it.

    Raises:
        ValueError: not `1 <= low <= high`.
    """
    if not 1 <= law.low <= law.high:
        raise ValueError(f"{law}; expected 1 <= low <= high.")
    levels = range(law.low, law.high + 1)
    weights = [r**-law.exponent for r in levels]
    total, below, each = sum(weights), 0.0, list[Ranks]()
    for rank, weight in zip(levels, weights, strict=True):
        below += weight / total
        while len(each) < clients and (len(each) + 0.5) / clients <= below + 1e-12:
            each.append(rank)
    return each


def deal(client_ids: Sequence[str], each: list[Ranks], seed: int) -> dict[str, Ranks]:
    """Shuffle by the seed and hand out, in the order of the ids."""
    random.Random(stable_seed(seed, "ranks")).shuffle(each)
    dealt = dict(zip(sorted(client_ids), each, strict=True))
    return {c: dealt[c] for c in client_ids}


def mean(r: Ranks) -> float:
    """The size of a type: its rank, or the mean of its ranks."""
    return sum(r.values()) / len(r) if isinstance(r, Mapping) else r


def label(r: Ranks) -> str:
    """A type as people read it: `8`, or `30/200` for ranks that depend on the module."""
    return "/".join(map(str, r.values())) if isinstance(r, Mapping) else str(r)
