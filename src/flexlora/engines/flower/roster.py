"""Who is connected: nodes are greeted once, checked, and become clients of the federation."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.serverapp import Grid

from flexlora.engines.flower.messages import Parcel, message, unpack
from flexlora.federation.ranks import About

EXPECTED = ("wire", "base", "tokenizer", "template")
"""What a node must have in common with the server."""


@dataclass(frozen=True)
class Member:
    """A node that may take part.

    Attributes:
        node: Flower's id of it, which its key has authenticated.
        client: the id it takes part under.
        examples: it enrolled with; it can never claim more.
        wanted: rank it asks for, if any.
        category: of its task, for plans that go by it.
        about: the rest of its greeting, for people.
    """

    node: int
    client: str
    examples: int
    wanted: int | None = None
    category: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Roster:
    """The members of a federation, kept up to date.

    Attributes:
        grid: Flower's way to the nodes.
        ours: the server's own values of what nodes must have in common with it.
        targets: module patterns, from which a node with a memory budget derives its rank.
        enrolled: client -> what it first enrolled with, over all sittings.
        say: told who came and who was turned away.
        members: client -> member, connected or not.
        turned_away: node -> why.
    """

    grid: Grid
    ours: Mapping[str, Any]
    targets: tuple[str, ...]
    enrolled: dict[str, About]
    say: Callable[[str], None]
    members: dict[str, Member] = field(default_factory=dict)
    turned_away: dict[int, str] = field(default_factory=dict)

    def connected(self, patience: float = 60.0) -> dict[str, Member]:
        """Members that are there now; nodes that are new are greeted first."""
        there = set(self.grid.get_node_ids())
        self.turned_away = {n: why for n, why in self.turned_away.items() if n in there}
        for client in [c for c, m in self.members.items() if m.node not in there]:
            self.say(f"{client} is gone")
            del self.members[client]  # greeted again when it comes back, perhaps at another rank
        new = there - {m.node for m in self.members.values()} - self.turned_away.keys()
        for node, parcel in greet(self.grid, sorted(new), self.targets, patience):
            self._welcome(node, parcel)
        return dict(sorted(self.members.items()))

    def dismiss(self, client: str) -> None:
        """Forget a member, so that it is greeted again."""
        self.members.pop(client, None)

    def _welcome(self, node: int, parcel: Parcel) -> None:
        try:
            member = checked(node, parcel.about, self.ours)
            other = self.members.get(member.client)
            if other is not None:
                raise ValueError(f"client {member.client!r} is already connected, at another node")
        except ValueError as error:
            self.turned_away[node] = str(error)
            self.say(f"node {node} is turned away: {error}")
            return
        first = About(member.examples, member.category)
        first = self.enrolled.setdefault(member.client, first)
        member = replace(member, examples=min(first.num_examples, member.examples))
        self.members[member.client] = member
        rank = f", wants rank {member.wanted}" if member.wanted else ""
        self.say(
            f"{member.client} is here: {member.examples} examples, {member.about['precision']} on "
            f"{member.about['device']}{rank}"
        )


def greet(
    grid: Grid, nodes: list[int], targets: tuple[str, ...], patience: float
) -> Iterator[tuple[int, Parcel]]:
    """Ask nodes who they are; those that answer in time, in any order."""
    waiting: dict[str, int] = {}
    for node in nodes:
        hello = message(Parcel({"targets": list(targets)}), "query.hello", node, "hello", patience)
        if id := next(iter(grid.push_messages([hello])), ""):
            waiting[id] = node
    end = time.monotonic() + patience
    while waiting and time.monotonic() < end:
        for id in list(waiting):
            for reply in grid.pull_messages([id]):
                node = waiting.pop(id)
                try:
                    yield node, Parcel() if reply.has_error() else unpack(reply.content)
                except ValueError:
                    yield node, Parcel()
        time.sleep(0.05)


def checked(node: int, about: Mapping[str, Any], ours: Mapping[str, Any]) -> Member:
    """A greeting as a member.

    Raises:
        ValueError: what does not fit, in the server's words.
    """
    if not about or "reason" in about:
        raise ValueError("it could not answer; see its errors.log")
    for name in EXPECTED:
        if about.get(name) != ours[name]:
            raise ValueError(f"its {name} differs from the server's {str(ours[name])[:16]}")
    client, sizes, rank = about.get("client"), about.get("examples"), about.get("rank")
    if not isinstance(client, str) or not re.fullmatch(r"[\w.-]{1,64}", client, re.ASCII):
        raise ValueError("its client id is not 1 to 64 letters, digits, '_', '-' or '.'")
    examples = sizes.get("train") if isinstance(sizes, dict) else None
    if type(examples) is not int or not 1 <= examples < 1 << 40:
        raise ValueError("it has no training examples")
    if not {"instruction", "output"} <= set(map(str, about.get("columns") or ())):
        raise ValueError("its data lacks the columns instruction and output")
    if not (rank is None or (type(rank) is int and rank >= 1)):
        raise ValueError("the rank it wants is not a whole number from 1")
    facts = {k: str(about.get(k))[:40] for k in ("flexlora", "precision", "device", "memory")}
    category = about.get("category")
    if not isinstance(category, str) or not re.fullmatch(r"[\w &.-]{0,64}", category, re.ASCII):
        category = ""
    return Member(node, client, examples, rank, category, facts)
