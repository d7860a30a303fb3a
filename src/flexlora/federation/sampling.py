"""Who takes part in a round: a pure function of the run's seed and the round, replayed at will."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from flexlora.adapter import stable_seed


def cohort(
    seed: int, round: int, clients: Sequence[str], size: int, drop_out: float = 0.0
) -> tuple[str, ...]:
    """The clients that take part in one round: uniform, without replacement, ascending by id.

    Nothing is remembered between rounds, so a resumed run, a plan and a report all see the same
    cohorts. Drop-outs are drawn per client and apart from the invitation: `drop_out=0.0` gives the
    invited, and with a larger probability the answer is a subset of them, perhaps nobody.

    Cost: `O(size)`, however many are registered.

    Args:
        seed: the run's seed.
        round: counts from 1.
        clients: everyone registered, in the same order every time.
        size: how many are invited.
        drop_out: probability, from 0 to below 1, that an invited client never answers.

    Raises:
        ValueError: a size or a probability out of range, or a round below 1.

    >>> people = [f"client-{i}" for i in range(100_000)]
    >>> cohort(7, 1, people, 3)
    ('client-14010', 'client-20980', 'client-684')
    >>> set(cohort(7, 1, people, 80, drop_out=0.5)) < set(cohort(7, 1, people, 80))
    True
    """
    if not 1 <= size <= len(clients):
        raise ValueError(
            f"cohort: size {size} of {len(clients)} registered clients; expected 1 to "
            f"{len(clients)}. Lower the cohort size or register more clients."
        )
    if not 0 <= drop_out < 1:
        raise ValueError(f"cohort: drop_out {drop_out}; expected a probability from 0 to below 1.")
    if round < 1:
        raise ValueError(f"cohort: round {round}; rounds count from 1.")
    draw = random.Random(stable_seed(seed, "cohort", round))
    invited = sorted(clients[i] for i in draw.sample(range(len(clients)), size))
    return tuple(c for c in invited if not _drops(seed, round, c, drop_out))


def _drops(seed: int, round: int, client: str, probability: float) -> bool:
    return random.Random(stable_seed(seed, "drop-out", round, client)).random() < probability


@dataclass(frozen=True)
class Coverage:
    """How much of a population a run has met: what "cross-device" means for it.

    Attributes:
        registered: clients that could have been sampled.
        sampled: clients that took part at least once.
        mean_visits: rounds per registered client.
    """

    registered: int
    sampled: int
    mean_visits: float

    def __str__(self) -> str:
        return (
            f"{self.registered} clients registered, {self.sampled} ever sampled, "
            f"{self.mean_visits:.2f} visits per client on average"
        )


def coverage(
    seed: int, rounds: int, clients: Sequence[str], size: int, drop_out: float = 0.0
) -> Coverage:
    """Coverage after `rounds` rounds, by replaying every cohort.

    >>> print(coverage(7, 50, [str(i) for i in range(1_506)], 80))
    1506 clients registered, 1399 ever sampled, 2.66 visits per client on average
    """
    visits: Counter[str] = Counter()
    for round in range(1, rounds + 1):
        visits.update(cohort(seed, round, clients, size, drop_out))
    return Coverage(len(clients), len(visits), visits.total() / len(clients))
