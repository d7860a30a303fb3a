"""Answers that a node keeps until the server says it has them on its disk.

Flower hands a reply to a server once. A server that dies between taking it and storing it asks the
same again after its restart, and must get the same bytes: training twice would not even be wrong,
but it would be another update.
"""

from __future__ import annotations

import os
from pathlib import Path

KEPT = 2
"""Answers kept without an acknowledgement: this round's and the one before."""


def recall(folder: Path, answers: str, acknowledged: str = "") -> bytes | None:
    """The stored answer to a payload, if there is one; forgets the one that is acknowledged.

    Args:
        folder: of the node.
        answers: digest of the payload.
        acknowledged: digest of an earlier payload, whose answer the server has stored.
    """
    for path in _kept(folder):
        if acknowledged and path.stem == acknowledged:
            path.unlink(missing_ok=True)
    path = _path(folder, answers)
    return path.read_bytes() if path.is_file() else None


def remember(folder: Path, answers: str, data: bytes) -> None:
    """Store an answer, all of it or nothing, before it is sent; the oldest make room."""
    store(_path(folder, answers), data)
    for path in _kept(folder)[:-KEPT]:
        path.unlink(missing_ok=True)


def store(path: Path, data: bytes) -> None:
    """Write a file so that a kill leaves it whole or absent: write, flush, rename, flush."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(scratch, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _path(folder: Path, answers: str) -> Path:
    return folder / "answers" / f"{answers}.safetensors"


def _kept(folder: Path) -> list[Path]:
    """Oldest first."""
    found = (folder / "answers").glob("*.safetensors")
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
