"""Who gets which rank: a plan as it is written becomes a rank for every client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from flexlora.federation.plans import (
    DATA,
    INSTEAD,
    PAPER_TYPES,
    About,
    PowerLaw,
    Ranks,
    by_data,
    deal,
    instead,
    label,
    mean,
    named,
    power_law,
    repeat,
)

__all__ = ["PAPER_TYPES", "About", "Plan", "PowerLaw", "Ranks", "assign", "count", "label"]

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
        raise ValueError(f"{len(client_ids)} client ids; expected some, each once.")
    ranks = _one_each(client_ids, plan, seed, types, about or {})
    for client, r in ranks.items():
        values = r.values() if isinstance(r, Mapping) else [r]
        if not values or any(type(v) is not int or v < 1 for v in values):
            raise ValueError(f"{r!r} for client {client!r}; expected whole numbers from 1.")
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
    if isinstance(plan, str) and plan.startswith(tuple(INSTEAD)):
        kind, _, name = plan.partition("-of-")
        return instead(kind, assign(client_ids, name, seed, types, about))
    if plan in DATA:
        return by_data(client_ids, str(plan), seed, types, about)
    if isinstance(plan, str):
        return named(client_ids, plan, seed, types)
    if isinstance(plan, PowerLaw):
        return deal(client_ids, power_law(plan, len(client_ids)), seed)
    if isinstance(plan, Mapping):
        return _mapping(client_ids, plan, seed)
    if len(plan) != len(client_ids):
        raise ValueError(
            f"a list of {len(plan)} for {len(client_ids)} clients; expected one entry each."
        )
    return dict(zip(client_ids, plan, strict=True))


def _mapping(
    client_ids: Sequence[str], plan: Mapping[int, float] | Mapping[str, Ranks], seed: int
) -> dict[str, Ranks]:
    """A mapping is read by what it holds: shares, clients, or module patterns."""
    if not plan:
        raise ValueError("an empty mapping; expected shares, clients or module patterns.")
    if any(isinstance(v, float) for v in plan.values()):
        shares = {r: float(v) for r, v in plan.items() if not isinstance(v, Mapping)}
        if not abs(sum(shares.values()) - 1) <= 1e-6 or min(shares.values()) < 0:
            raise ValueError(f"mixture {dict(plan)}; expected shares that sum to 1.")
        levels = sorted(r for r in shares if isinstance(r, int))
        if len(levels) != len(plan):
            raise ValueError(f"mixture {dict(plan)}; expected whole numbers as ranks.")
        each = repeat(levels, [shares[r] for r in levels], len(client_ids))
        return deal(client_ids, each, seed)
    explicit: dict[str, Ranks] = {
        str(k): v if isinstance(v, Mapping) else int(v) for k, v in plan.items()
    }
    if explicit.keys() & set(client_ids) or all(isinstance(k, int) for k in plan):
        missing = sorted(set(client_ids) - explicit.keys())
        extra = sorted(explicit.keys() - set(client_ids))
        if missing or extra:
            raise ValueError(
                f"a rank per client must name each client once: {len(missing)} missing "
                f"{missing[:3]}, {len(extra)} unknown {extra[:3]}."
            )
        return {c: explicit[c] for c in client_ids}
    patterns = {k: v for k, v in explicit.items() if isinstance(v, int)}
    if len(patterns) != len(explicit):
        raise ValueError(f"{sorted(explicit)[:3]} names no client; ids: {client_ids[:3]}.")
    return dict.fromkeys(client_ids, patterns)


def count(assigned: Mapping[str, Ranks] | Iterable[tuple[str, Ranks]]) -> dict[str, int]:
    """Clients per type, from small to large: what a plan prints."""
    ranks = list(dict(assigned).values())
    counted = Counter(label(r) for r in sorted(ranks, key=mean))
    return dict(counted)
