"""The rounds of a run: sample, do a round, hand it out, again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from flexlora.federation.round import Engine, RoundRecord, Rules, run_round
from flexlora.federation.sampling import cohort
from flexlora.federation.spool import Spool
from flexlora.federation.state import Client, Method, ServerState
from flexlora.federation.telemetry import levels

Setting = Literal["cross-device", "cross-silo"]


@dataclass(frozen=True)
class Schedule:
    """How long a run is and who is invited.

    Attributes:
        rounds: the last round.
        cohort_size: clients invited each round.
        drop_out: probability that an invited client never takes part.
        setting: `cross-device`: a fraction of the clients each round, and they keep nothing.
            `cross-silo`: everyone each round; clients may keep state.
        changes: round -> client id -> what that client is from then on, None: not there. So one
            may join late, leave, or fall back to a lower rank.
    """

    rounds: int
    cohort_size: int
    drop_out: float = 0.0
    setting: Setting = "cross-device"
    changes: Mapping[int, Mapping[str, Client | None]] = field(default_factory=dict)


def enrolled(clients: Sequence[Client], schedule: Schedule, round: int) -> dict[str, Client]:
    """Who could be invited to a round, by id, ascending; a pure function of the round.

    >>> from flexlora.adapter import LoraSpec
    >>> a, b = (Client(c, LoraSpec(8), 1) for c in "ab")
    >>> late = Schedule(9, 1, changes={1: {"b": None}, 5: {"b": b}})
    >>> list(enrolled([a, b], late, 4)), list(enrolled([a, b], late, 5))
    (['a'], ['a', 'b'])
    """
    there: dict[str, Client | None] = {c.id: c for c in clients}
    for when in sorted(schedule.changes):
        if when <= round:
            there |= schedule.changes[when]
    return {id: c for id, c in sorted(there.items()) if c is not None}


def run(
    method: Method,
    state: ServerState,
    clients: Sequence[Client],
    engine: Engine,
    schedule: Schedule,
    spool: Spool,
    rules: Rules | None = None,
) -> Iterator[tuple[ServerState, RoundRecord]]:
    """Every round from the state's on, as `(state after it, record)`; save it, evaluate it, go on.

    Cohorts depend on `state.seed`, the round and the clients' ids only, so a run that is taken up
    from a saved state goes on exactly as it would have.

    Raises:
        ValueError: as :func:`suits` and :func:`~flexlora.federation.round.run_round`.
    """
    suits(method, clients, schedule)
    rules = rules or Rules()
    rules = replace(rules, levels=rules.levels or levels(clients))
    return _rounds(method, state, clients, engine, schedule, spool, rules)


def _rounds(
    method: Method,
    state: ServerState,
    clients: Sequence[Client],
    engine: Engine,
    schedule: Schedule,
    spool: Spool,
    rules: Rules,
) -> Iterator[tuple[ServerState, RoundRecord]]:
    size = schedule.cohort_size
    by_id: dict[str, Client] = {}
    while state.round < schedule.rounds:
        round = state.round + 1
        if not by_id or round in schedule.changes:  # not every round: there may be many
            by_id = enrolled(clients, schedule, round)
            ids = list(by_id)
        invited = cohort(state.seed, round, ids, size)
        present = cohort(state.seed, round, ids, size, schedule.drop_out)
        state, record = run_round(method, state, [by_id[c] for c in present], engine, spool, rules)
        dropped = tuple(c for c in invited if c not in set(present))
        yield state, replace(record, dropped=dropped)


def suits(method: Method, clients: Sequence[Client], schedule: Schedule) -> None:
    """Refuse, before anything starts, a federation that a method cannot serve.

    Raises:
        ValueError: clients of unequal rank for a method that averages factors, a method whose
            clients keep state in the cross-device setting, ids that are not unique, or a cohort
            that does not fit the setting.
    """
    if len({c.id for c in clients}) < len(clients):
        raise ValueError("clients: ids must be unique; at least one appears twice.")
    later = (c for step in schedule.changes.values() for c in step.values() if c is not None)
    ranks = list(levels([*clients, *later]))
    if len(ranks) > 1 and not method.mixed_ranks:
        raise ValueError(
            f"method {method.name!r} needs one rank for all {len(clients)} clients, and they have "
            f"{', '.join(ranks)}. Use `homogeneous` ranks, or a method for mixed ones (flexlora)."
        )
    if schedule.setting == "cross-device" and not method.stateless:
        raise ValueError(
            f"method {method.name!r} needs clients that keep state between rounds, which "
            "cross-device clients do not: use the cross-silo setting or another method."
        )
    for round in schedule.changes:
        there = len(enrolled(clients, schedule, round))
        if there < schedule.cohort_size:
            raise ValueError(
                f"from round {round} on {there} clients are there, a cohort has "
                f"{schedule.cohort_size}. Lower the cohort's size or let fewer leave."
            )
    if schedule.setting == "cross-silo" and schedule.cohort_size != len(clients):
        raise ValueError(
            f"cross-silo: a cohort of {schedule.cohort_size} of {len(clients)} clients; in this "
            "setting everyone takes part in every round."
        )
