"""The engine over Flower: payloads to nodes, answers one by one as they come, until a deadline."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from flexlora.engines.flower.answers import decode_update
from flexlora.engines.flower.messages import Kind, Parcel, message, unpack
from flexlora.engines.flower.wire import digest, encode_payload
from flexlora.federation.admission import Reason, Refusal, Refused
from flexlora.federation.state import Client, Payload, Update, Wire

SENTENCES = {
    Reason.OFFLINE: "its node is not connected.",
    Reason.FAILED: "it failed; what happened is in the node's errors.log.",
    Reason.MEMORY: "it ran out of memory at every rank it tried.",
    Reason.LATE: "it had not answered at the deadline.",
    Reason.BASE: "it holds another base model.",
    Reason.UNKNOWN_CLIENT: "its node now takes part as another client.",
    Reason.MALFORMED: "its reply is not a flexlora reply.",
}
"""What a refusal says, in the server's words: a node only names one of these."""

FLOWER_ERRORS = {3: Reason.LATE, 5: Reason.OFFLINE, 8: Reason.OFFLINE}
"""Flower's codes: message unavailable, node unavailable, its app stopped. Any other: failed."""


@dataclass
class Traffic:
    """What one client has moved and how long it took, in the latest round."""

    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    state: str = "waiting"


@dataclass(eq=False)
class Flower:
    """Trains clients on the nodes of a federation.

    Attributes:
        grid: Flower's way to them.
        nodes: client -> the node it is at.
        wire: precision of the numbers.
        run: identifies the run.
        settings: of training, evaluation and prompts: what nodes are told with each payload.
        deadline: seconds after which a round ends, with whoever has answered.
        poll: seconds between looks.
        traffic: per client, in the latest round.
        late: message id -> client, of earlier rounds; their answers are thrown away.
        late_answers: client -> how many of its answers came too late so far.
        stored: client -> digest of the latest payload whose answer was taken; the node hears of it
            with its next message and forgets that answer.
    """

    grid: Grid
    nodes: Mapping[str, int]
    wire: Wire = "float32"
    run: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    deadline: float = 3600.0
    poll: float = 0.2
    traffic: dict[str, Traffic] = field(default_factory=dict)
    late: dict[str, str] = field(default_factory=dict)
    late_answers: dict[str, int] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)

    def train(
        self, payloads: Sequence[Payload], clients: Mapping[str, Client]
    ) -> Iterator[Update | Refusal]:
        """Updates as they arrive; at the deadline, who is late."""
        by_client = {p.client: p for p in payloads}
        answers: dict[str, str] = {}
        for client, found in self._ask("train", by_client, answers):
            if isinstance(found, Refusal):
                yield found
                continue
            try:
                payload = by_client[client]
                update = decode_update(found.data, payload, answers[client], self.wire)
            except Refused as refused:
                yield refused.refusal
                continue
            del found
            yield update
            self.stored[client] = answers[client]  # whoever took it has done with it what it would

    def evaluate(
        self, payloads: Sequence[Payload], wanted: Mapping[str, Any]
    ) -> dict[str, tuple[dict[str, float], int]]:
        """Client -> means of its metrics and how many examples they are over; who answers counts.

        Args:
            payloads: the model each client is to be measured under.
            wanted: split, metrics and limits.
        """
        scores: dict[str, tuple[dict[str, float], int]] = {}
        about = {"evaluation": dict(wanted)}
        for client, found in self._ask("evaluate", {p.client: p for p in payloads}, {}, about):
            if isinstance(found, Parcel):
                values, examples = found.about.get("values"), found.about.get("examples")
                if _is_score(values, examples):
                    scores[client] = values, examples  # type: ignore[assignment]
        return dict(sorted(scores.items()))

    def _ask(
        self,
        kind: Kind,
        payloads: Mapping[str, Payload],
        answers: dict[str, str],
        about: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[str, Parcel | Refusal]]:
        """Send each client its payload and hand out replies as they come."""
        began, end = time.monotonic(), time.monotonic() + self.deadline
        self.traffic = {client: Traffic() for client in payloads}
        waiting: dict[str, str] = {}
        for client, payload in payloads.items():
            data = encode_payload(payload, self.wire, self.run)
            answers[client] = digest(data)
            self.traffic[client].bytes_down = len(data)
            plain = {**self.settings, **(about or {}), "wire": self.wire, "run": self.run}
            parcel = Parcel({**plain, "acknowledged": self.stored.get(client, "")}, data)
            if sent := self._push(kind, client, parcel, payload.round):
                waiting[sent] = client
            else:
                yield client, self._refusal(client, Reason.OFFLINE)
        try:
            while waiting and time.monotonic() < end:
                arrived = 0
                for id in list(waiting):
                    for reply in self.grid.pull_messages([id]):
                        client, arrived = waiting.pop(id), arrived + 1
                        self.traffic[client].seconds = time.monotonic() - began
                        yield client, self._opened(client, reply)
                self._discard_late()
                if not arrived:
                    time.sleep(self.poll)
            for client in waiting.values():
                yield client, self._refusal(client, Reason.LATE)
        finally:
            self.late |= waiting

    def _push(self, kind: Kind, client: str, parcel: Parcel, round: int) -> str:
        """The message's id, or nothing if the node is not there."""
        if client not in self.nodes:
            return ""
        node = self.nodes[client]
        sent = message(parcel, kind, node, str(round), max(self.deadline, 1.0))
        return next(iter(self.grid.push_messages([sent])), "")

    def _opened(self, client: str, reply: Message) -> Parcel | Refusal:
        """A reply, or why there is none; a node's own words go no further."""
        if reply.has_error():
            return self._refusal(client, FLOWER_ERRORS.get(reply.error.code, Reason.FAILED))
        try:
            parcel = unpack(reply.content)
        except ValueError:
            return self._refusal(client, Reason.MALFORMED)
        self.traffic[client].bytes_up = len(parcel.data)
        if "reason" in parcel.about:
            said = parcel.about["reason"]
            known = next((r for r in SENTENCES if r.value == said), Reason.FAILED)
            return self._refusal(client, known)
        self.traffic[client].state = "answered"
        return parcel

    def _refusal(self, client: str, reason: Reason) -> Refusal:
        self.traffic[client].state = reason.value
        return Refusal(client, reason, SENTENCES[reason])

    def _discard_late(self) -> None:
        """Take answers to earlier rounds out of Flower's store, count them, and drop them."""
        for id in list(self.late):
            for reply in self.grid.pull_messages([id]):
                client = self.late.pop(id)
                if not reply.has_error():
                    self.late_answers[client] = self.late_answers.get(client, 0) + 1


def _is_score(values: object, examples: object) -> bool:
    """Whether a node's claim about itself has the form of one: finite numbers under short names."""
    return (
        isinstance(values, dict)
        and len(values) <= 16
        and all(len(k) <= 48 for k in values)
        and all(type(v) in (int, float) and math.isfinite(v) for v in values.values())
        and type(examples) is int
        and 0 < examples < 1 << 40
    )
