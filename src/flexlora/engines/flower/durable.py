"""An engine that forgets nothing: what has come in is on the disk before it is counted.

It stands before any other engine. After a kill the same round is played again: stored answers come
from the disk, only the others are asked for; a round that the ledger has closed is made of exactly
the clients it names.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexlora.engines.flower.answers import decode_update, encode_update
from flexlora.engines.flower.replay import store
from flexlora.engines.flower.wire import digest
from flexlora.federation.admission import Reason, Refusal, Refused
from flexlora.federation.round import Engine
from flexlora.federation.state import Client, Payload, Update, Wire


@dataclass(eq=False)
class Durable:
    """Another engine's answers, each stored as it comes.

    Attributes:
        engine: that is asked for what is not stored.
        folder: one folder per round, one file per answer.
        wire: precision at which answers came, so that storing them loses nothing.
        run: identifies the run.
        enough: answers after which a round is closed; the others are late.
        closed: round -> the clients that the ledger says were admitted.
        received: client -> bytes and digest of what it sent, in the latest round.
    """

    engine: Engine
    folder: Path
    wire: Wire = "float32"
    run: str = ""
    enough: int | None = None
    closed: Mapping[int, Collection[str]] = field(default_factory=dict)
    received: dict[str, tuple[int, str]] = field(default_factory=dict)

    def train(
        self, payloads: Sequence[Payload], clients: Mapping[str, Client]
    ) -> Iterator[Update | Refusal]:
        """What is stored, then what comes; late are those not in when enough have answered."""
        self.received.clear()
        missing = {p.client: p for p in payloads}
        for payload in payloads:
            path = self._path(payload)
            if path.is_file():
                del missing[payload.client]
                yield from self._opened(path.read_bytes(), payload)
        if payloads and payloads[0].round in self.closed:
            self._insist(payloads)
            return
        sent = dict(missing)
        for answer in self.engine.train(list(missing.values()), clients) if missing else ():
            asked = sent.get(answer.client)
            if isinstance(answer, Refusal) or asked is None:
                yield answer
            else:
                data = encode_update(answer, asked, self._tag(asked), self.wire)
                store(self._path(asked), data)
                yield from self._opened(data, asked)
            missing.pop(answer.client, None)
            if self.enough is not None and len(self.received) >= self.enough:
                break
        for client in missing:
            yield Refusal(client, Reason.LATE, "the round was closed before it answered.")

    def forget(self, upto: int) -> None:
        """Delete the answers of rounds that a checkpoint holds the outcome of."""
        for folder in self.folder.glob("round-*"):
            if int(folder.name.removeprefix("round-")) <= upto:
                shutil.rmtree(folder)

    def _opened(self, data: bytes, payload: Payload) -> Iterator[Update | Refusal]:
        """Fresh and replayed answers take the same way, so that they are the same numbers."""
        try:
            update = decode_update(data, payload, self._tag(payload), self.wire)
        except Refused as refused:
            yield refused.refusal
            return
        self.received[payload.client] = len(data), digest(data)
        yield update

    def _insist(self, payloads: Sequence[Payload]) -> None:
        round = payloads[0].round
        lost = set(self.closed[round]) - self.received.keys()
        if lost:
            raise ValueError(
                f"round {round}: the ledger admits {sorted(lost)[:3]}, whose updates are not in "
                f"{self.folder}. Restore that folder, or go on from a copy of the whole run."
            )

    def _tag(self, payload: Payload) -> str:
        return f"{self.run}/{payload.base}/{payload.round}/{payload.client}"

    def _path(self, payload: Payload) -> Path:
        name = digest(payload.client.encode())[:32]
        return self.folder / f"round-{payload.round:05d}" / f"{name}.safetensors"
