"""The ledger: what became of every update, hash-chained, one closed round after another.

One JSON object a line. An update's line says who, in which round, at which rank, how many bytes,
their digest and the verdict; a closing line ends the round. Every line carries the hash of the one
before it, so that none can be changed, left out or put in between without all later ones changing.
A round's lines are written at once and flushed; a round without its closing line never happened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexlora.federation.round import RoundRecord

ADMITTED = "admitted"
START = "0" * 64
"""What the first line is chained to."""


@dataclass(frozen=True)
class Entry:
    """One update's fate.

    Attributes:
        round: from 1.
        client: its id.
        ranks: the distinct ranks it came at; empty if nothing was admitted.
        bytes: as they came; 0 if nothing came.
        digest: SHA-256 of these bytes; empty if nothing came.
        verdict: `admitted`, or a refusal's reason.
    """

    round: int
    client: str
    ranks: tuple[int, ...]
    bytes: int
    digest: str
    verdict: str


def entries(record: RoundRecord, received: Mapping[str, tuple[int, str]]) -> list[Entry]:
    """What a round's record says of each update, with what came over the wire.

    Args:
        record: of the round.
        received: client -> bytes and digest of what it sent.
    """
    found = [
        Entry(record.round, client, tuple(row["ranks"]), *received.get(client, (0, "")), ADMITTED)
        for client, row in record.clients.items()
    ]
    for refusal in record.refused:
        came = received.get(refusal.client, (0, ""))
        found.append(Entry(record.round, refusal.client, (), *came, refusal.reason.value))
    return found


def append(path: Path, round: int, updates: Sequence[Entry], state: str) -> str:
    """Close a round: its lines and the closing one, flushed to the disk together.

    What an earlier kill left behind must have been :func:`cut` off.

    Args:
        path: the ledger.
        round: that is closed.
        updates: its entries.
        state: digest of the server's state after it.

    Returns:
        The hash of the closing line, which vouches for everything before it.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    last = json.loads(lines[-1])["hash"] if lines else START
    rows: list[dict[str, Any]] = [asdict(entry) for entry in updates]
    text = ""
    for row in [*rows, {"round": round, "closed": len(rows), "state": state}]:
        last = _hash(last, row)
        text += json.dumps({**row, "hash": last}) + "\n"
    with path.open("a", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    return last


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Every line of closed rounds, verified.

    Raises:
        ValueError: a line that is not chained to the one before it.
    """
    last, waiting = START, list[dict[str, Any]]()
    for number, row in enumerate(_rows(path), 1):
        found = row.pop("hash", None)
        last = _hash(last, row)
        if found != last:
            raise ValueError(
                f"{path}, line {number}: its hash does not follow from the lines before it. The "
                "ledger was changed; restore it, or treat the run as unproven."
            )
        waiting.append({**row, "hash": last})
        if "closed" in row:
            yield from waiting
            waiting.clear()


def cut(path: Path) -> None:
    """Take away what a kill left of a round that was never closed."""
    size = sum(len(json.dumps(row)) + 1 for row in read(path))
    if path.exists() and path.stat().st_size > size:
        with path.open("r+b") as out:
            out.truncate(size)
            os.fsync(out.fileno())


def admitted(path: Path) -> dict[int, tuple[str, ...]]:
    """Round -> the clients whose updates made it, for closed rounds."""
    rounds: dict[int, tuple[str, ...]] = {}
    for row in read(path):
        rounds.setdefault(row["round"], ())
        if row.get("verdict") == ADMITTED:
            rounds[row["round"]] += (row["client"],)
    return rounds


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Complete lines; the last may be torn."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            yield dict(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number}: not a JSON object.") from None


def _hash(last: str, row: Mapping[str, Any]) -> str:
    return hashlib.sha256((last + json.dumps(row)).encode()).hexdigest()
