"""Where a run stands, for another terminal: `flexlora status RUN`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexlora.experiment import runs
from flexlora.federation.admission import Refusal
from flexlora.federation.state import Client, Payload, Update

if TYPE_CHECKING:
    from flexlora.engines.flower.grid import Flower


@dataclass(eq=False)
class Board:
    """What `status.json` says while a server runs; rewritten at most once a second."""

    folder: Path
    rounds: int
    clients: dict[str, dict[str, Any]] = field(default_factory=dict)
    turned_away: Mapping[int, str] = field(default_factory=dict)
    round: int = 0
    written: float = 0.0

    def roster(self, clients: Sequence[Client], turned_away: Mapping[int, str]) -> None:
        """Who is connected now; what they moved last stays."""
        now = {c.id: {"rank": c.lora.r, "examples": c.num_examples} for c in clients}
        self.clients = {
            id: {**self.clients.get(id, {}), **row, "state": "connected"} for id, row in now.items()
        }
        self.turned_away = dict(turned_away)
        self._write()

    def watching(self, flower: Flower) -> Watching:
        """The same engine, with its traffic on the board."""
        return Watching(flower, self)

    def traffic(self, flower: Flower) -> None:
        """What has moved in this round."""
        for client, moved in flower.traffic.items():
            late = flower.late_answers.get(client, 0)
            self.clients.setdefault(client, {}).update(asdict(moved), late_answers=late)
        if time.monotonic() - self.written > 1.0:
            self._write()

    def finished(self) -> None:
        """The last word."""
        self._write("finished")

    def _write(self, state: str = "running") -> None:
        self.written = time.monotonic()
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        about = {
            "state": state,
            "at": now,
            "round": self.round,
            "rounds": self.rounds,
            "clients": self.clients,
            "turned_away": {str(n): why for n, why in self.turned_away.items()},
        }
        runs.write(self.folder / "status.json", json.dumps(about, indent=1))


@dataclass(frozen=True, eq=False)
class Watching:
    """An engine whose every answer shows on a board."""

    flower: Flower
    board: Board

    def train(
        self, payloads: Sequence[Payload], clients: Mapping[str, Client]
    ) -> Iterator[Update | Refusal]:
        """The engine's answers."""
        self.board.round = payloads[0].round
        self.board._write()
        for answer in self.flower.train(payloads, clients):
            self.board.traffic(self.flower)
            yield answer
        self.board.traffic(self.flower)
        self.board._write()


def status(folder: Path) -> dict[str, Any]:
    """Where a run stands, from its directory alone; nothing is written.

    Raises:
        Failure: not a run directory.
    """
    config = runs.open_run(folder)
    lines = runs.read_metrics(folder)
    rounds = [line for line in lines if line["kind"] == "round"]
    board = folder / "status.json"
    return {
        "run_dir": str(folder),
        "finished": (folder / "summary.json").is_file(),
        "round": rounds[-1]["round"] if rounds else 0,
        "rounds": config.federation.rounds,
        "last": _last(rounds[-1]) if rounds else None,
        "server": runs.read(board) if board.is_file() else None,
    }


def _last(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "admitted": {
            c: {"ranks": row["ranks"], "bytes_up": row["bytes_up"]}
            for c, row in record["clients"].items()
        },
        "refused": {r["client"]: r["reason"] for r in record["refused"]},
        "loss": record["metrics"].get("loss"),
        "seconds": round(sum(record["seconds"].values()), 1),
    }


def _rank(r: object) -> str:
    """One rank, or the lowest and highest over the modules."""
    return f"{min(r.values())}-{max(r.values())}" if isinstance(r, dict) else str(r)


def describe(found: Mapping[str, Any]) -> str:
    """The same for people."""
    state = "finished" if found["finished"] else "not finished"
    lines = [f"{found['run_dir']}: {state}, {found['round']} of {found['rounds']} rounds done"]
    last, server = found["last"], found["server"]
    if last:
        loss = f", training loss {last['loss']:.3f}" if last["loss"] is not None else ""
        lines.append(f"last round: {len(last['admitted'])} admitted, {last['seconds']} s{loss}")
        lines += [f"  refused {client}: {reason}" for client, reason in last["refused"].items()]
    if server:
        lines.append(f"server at {server['at']}: {server['state']}, in round {server['round']}")
        lines.append(f"  {'client':24}{'rank':>6}{'state':>16}{'MB down':>10}{'MB up':>10}{'s':>8}")
        for client, row in server["clients"].items():
            down, up = (row.get(k, 0) / 1e6 for k in ("bytes_down", "bytes_up"))
            lines.append(
                f"  {client:24}{_rank(row.get('rank', '-')):>6}{row.get('state', '-'):>16}"
                f"{down:>10.2f}{up:>10.2f}{row.get('seconds', 0):>8.1f}"
            )
        lines += [f"  node {n} turned away: {why}" for n, why in server["turned_away"].items()]
    return "\n".join(lines)
