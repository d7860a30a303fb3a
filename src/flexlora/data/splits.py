"""Seen and unseen clients, and how much text the unseen ones share with what was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flexlora.adapter import stable_seed
from flexlora.data.settings import few, nearest
from flexlora.data.shingles import components, shingles, text_hashes
from flexlora.data.tabular import SPLITS
from flexlora.data.task import Example, Population, Task

By = Literal["client", "category", "component"]
SHARED = 0.1
"""A client leaks when at least this share of its examples does (the measure of PAPER.md)."""


@dataclass(frozen=True)
class Holdout:
    """Which clients may train, and which are only evaluated; in the population's order."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...]


def hold_out(
    population: Population,
    by: By = "client",
    fraction: float | None = None,
    count: int | None = None,
    clients: Sequence[str] = (),
    categories: Sequence[str] = (),
    seed: int = 0,
) -> Holdout:
    """Set clients aside as unseen.

    `client` draws them one by one, or takes those listed. `category` takes whole categories, those
    listed or drawn ones. `component` takes whole groups of clients that share text, so that no
    unseen client shares any with a seen one; it reads all text (:func:`text_components`).

    Whole groups are drawn in random order, each taken if it does not pass the number wanted: that
    number is reached as nearly as the groups allow and never passed.

    Args:
        population: all clients.
        by: what is drawn.
        fraction: of the clients to set aside; give this, or `count`, or a list.
        count: of clients to set aside.
        clients: exactly these, with `by="client"`.
        categories: exactly these, with `by="category"`.
        seed: of the draw.

    Raises:
        ValueError: an unknown client or category; not exactly one of `fraction`, `count` and the
            list; nobody left on one side.
    """
    groups = _groups(population, by)
    listed = {"client": clients, "category": categories}.get(by, ())
    given = [bool(clients), bool(categories), fraction is not None, count is not None]
    if sum(given) != 1 or (any(given[:2]) and not listed):
        raise ValueError(
            f"unseen (by {by}): fraction={fraction}, count={count}, "
            f"clients={few(clients) or None}, categories={few(categories) or None}; expected "
            "exactly one of fraction, count and a list that goes with `by`."
        )
    if listed:
        chosen = _listed(groups, listed, by)
    else:
        wanted = count if count is not None else round(len(population) * float(fraction or 0))
        chosen = _drawn(groups, wanted, seed)
    held = Holdout(
        tuple(c for c in population if c not in chosen), tuple(c for c in population if c in chosen)
    )
    if not held.seen or not held.unseen:
        raise ValueError(
            f"unseen (by {by}): {len(held.unseen)} of {len(population)} clients are unseen; "
            f"expected at least one on each side. The largest of {len(groups)} groups has "
            f"{max(map(len, groups.values()), default=0)} clients, the smallest "
            f"{min(map(len, groups.values()), default=0)}."
        )
    return held


def text_components(population: Population) -> list[tuple[str, ...]]:
    """Groups of clients that share text in any split, largest first; reads all of it."""
    return components((client, _texts(every(task))) for client, task in population.items())


@dataclass(frozen=True)
class Leakage:
    """Text that unseen clients have in common with the seen ones' training examples.

    Attributes:
        clients: unseen ones.
        examples: theirs, in all splits.
        sharing_clients: clients of whose examples at least 10 % share a run of eight words.
        identical_clients: clients of whose examples at least 10 % have an identical input.
        sharing_examples: examples that share a run of eight words.
        identical_examples: examples with an identical input.
        worst: up to five clients that share most, with the share of their examples.
    """

    clients: int
    examples: int
    sharing_clients: int
    identical_clients: int
    sharing_examples: int
    identical_examples: int
    worst: tuple[tuple[str, float], ...]

    @property
    def shared(self) -> float:
        """Share of unseen clients with shared text, 0 to 1."""
        return self.sharing_clients / self.clients if self.clients else 0.0

    @property
    def identical(self) -> float:
        """Share of unseen clients with identical inputs, 0 to 1."""
        return self.identical_clients / self.clients if self.clients else 0.0

    def __str__(self) -> str:
        lines = [
            f"leakage of {self.clients} unseen clients ({self.examples} examples):",
            f"  {self.shared:6.1%} of clients share a run of 8 words with a seen client's training "
            f"text in at least 10 % of their examples ({self.sharing_examples} examples)",
            f"  {self.identical:6.1%} of clients have identical inputs in at least 10 % of their "
            f"examples ({self.identical_examples} examples)",
        ]
        if self.worst:
            lines.append("  most: " + ", ".join(f"{c} {share:.0%}" for c, share in self.worst))
        return "\n".join(lines)


def leakage(population: Population, seen: Sequence[str], unseen: Sequence[str]) -> Leakage:
    """How much of the unseen clients' text was trained on. Reads the text of all those clients.

    The text of an example is its input, or its instruction where it has none: an instruction that
    goes with an input is the task's, not the example's.
    """
    texts = [_texts(every(population[client])) for client in unseen]
    runs, whole = [shingles(t) for t in texts], [text_hashes(t) for t in texts]
    # The unseen side is the small one: hold its hashes, and let the trained text pass by.
    nothing = np.zeros(1, np.uint64)  # an empty text's hash, which is never met
    wanted = np.unique(np.concatenate([nothing, *(hashes for hashes, _ in runs), *whole]))
    met = np.zeros(len(wanted), dtype=bool)
    for client in seen:
        trained = _texts(population[client].load("train"))
        here = np.unique(np.concatenate([shingles(trained)[0], text_hashes(trained)]))
        place = np.searchsorted(wanted[:-1], here)
        met[place[wanted[place] == here]] = True
    met[0] = False
    common = wanted[met]
    sharing = [len(np.unique(owner[np.isin(hashes, common)])) for hashes, owner in runs]
    identical = [int(np.isin(hashes, common).sum()) for hashes in whole]
    sizes = [len(t) for t in texts]
    shares = [found / size for found, size in zip(sharing, sizes, strict=True)]
    ranked = sorted(zip(unseen, shares, strict=True), key=lambda pair: -pair[1])[:5]
    return Leakage(
        clients=len(unseen),
        examples=sum(sizes),
        sharing_clients=sum(share >= SHARED for share in shares),
        identical_clients=sum(n >= SHARED * size for n, size in zip(identical, sizes, strict=True)),
        sharing_examples=sum(sharing),
        identical_examples=sum(identical),
        worst=tuple((client, share) for client, share in ranked if share > 0),
    )


def every(task: Task) -> Iterator[Example]:
    """A client's examples of all splits."""
    for split in SPLITS:
        yield from task.load(split)


def _groups(population: Population, by: By) -> dict[str, tuple[str, ...]]:
    """What is set aside together, by name."""
    if by == "client":
        return {client: (client,) for client in population}
    if by == "component":
        return {group[0]: group for group in text_components(population)}
    if by != "category":
        raise ValueError(f"unseen.by: {by!r}; expected 'client', 'category' or 'component'.")
    groups: dict[str, tuple[str, ...]] = {}
    for client, task in population.items():
        groups[task.category] = (*groups.get(task.category, ()), client)
    return groups


def _listed(groups: Mapping[str, tuple[str, ...]], names: Sequence[str], by: By) -> set[str]:
    for name in names:
        if name not in groups:
            raise ValueError(
                f"unseen: no {by} {name!r}{nearest(name, groups)}. There are {len(groups)}: "
                f"{few(groups)}."
            )
    return {client for name in names for client in groups[name]}


def _drawn(groups: Mapping[str, tuple[str, ...]], wanted: int, seed: int) -> set[str]:
    names = sorted(groups)
    order = np.random.default_rng(stable_seed(seed, "unseen")).permutation(len(names))
    chosen: set[str] = set()
    for i in order.tolist():
        if len(chosen) + len(groups[names[i]]) <= wanted:
            chosen.update(groups[names[i]])
    return chosen


def _texts(examples: Iterable[Example]) -> list[str]:
    return [example.input or example.instruction for example in examples]
