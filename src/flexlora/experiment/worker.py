"""A worker beside a node that keeps the model in memory between messages.

Flower starts a process for every message; importing torch and loading the model would be most of
its life. That process only carries the message to the worker and the answer back, over one socket
in a folder that no other user may enter. The worker is started by the first message and ends when
the node does.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import psutil

from flexlora.engines.flower.messages import Parcel

START_SECONDS = 300.0
"""For the worker to import what it needs."""

IDLE_SECONDS = 600.0
"""After which a worker ends that knows of no node process to watch."""


def ask(settings: Mapping[str, Any], kind: str, asked: Parcel) -> Parcel:
    """The worker's answer to one message; starts the worker if there is none.

    Raises:
        OSError, EOFError: a worker that cannot be started or that dies.
    """
    address = socket_of(Path(str(settings["folder"])))
    with _connected(address, Path(str(settings["folder"]))) as worker:
        about = {"settings": dict(settings), "kind": kind, "about": dict(asked.about)}
        worker.send_bytes(json.dumps(about).encode())
        worker.send_bytes(asked.data)
        return Parcel(json.loads(worker.recv_bytes()), worker.recv_bytes())


def socket_of(folder: Path) -> str:
    """Where the worker of a node listens: short, as sockets need, and closed to other users.

    Raises:
        PermissionError: that place belongs to someone else.
    """
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    place = Path(tempfile.gettempdir()) / f"flexlora-{os.getuid()}-{name}"
    place.mkdir(mode=0o700, exist_ok=True)
    found = place.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or place.is_symlink():
        raise PermissionError(f"{place} is not this user's alone; remove it.")
    return str(place / "worker")


def _connected(address: str, folder: Path) -> Connection:
    try:
        return Client(address, "AF_UNIX")
    except (FileNotFoundError, ConnectionRefusedError):
        Path(address).unlink(missing_ok=True)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "worker.log").open("ab") as log:
        command = [sys.executable, "-m", "flexlora.experiment.worker", address, str(_node() or 0)]
        started = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    threading.Thread(target=started.wait, daemon=True).start()  # it may end before its caller
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and started.poll() is None:
        try:
            return Client(address, "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.05)
    raise TimeoutError(f"the worker did not start; see {folder / 'worker.log'}.")


def _node() -> int | None:
    """The SuperNode that this process works for."""
    for parent in psutil.Process().parents():
        if any("flower-supernode" in word for word in parent.cmdline()[:3]):
            return parent.pid
    return None


def serve(address: str, node: int) -> None:
    """Answer messages, one at a time, until the node ends."""
    from flexlora.experiment.site import answer

    used = deque([time.monotonic()], maxlen=1)
    with Listener(address, "AF_UNIX") as listener:
        threading.Thread(target=_watch, args=(address, node, used), daemon=True).start()
        while True:
            try:
                with listener.accept() as caller:
                    wanted, data = json.loads(caller.recv_bytes()), caller.recv_bytes()
                    asked = Parcel(wanted["about"], data)
                    reply = answer(wanted["settings"], wanted["kind"], asked)
                    caller.send_bytes(json.dumps(dict(reply.about)).encode())
                    caller.send_bytes(reply.data)
                    used.append(time.monotonic())
            except (OSError, EOFError):
                continue  # the caller is gone; its answer is kept for the next


def _watch(address: str, node: int, used: deque[float]) -> None:
    """End with the node, or after a while without work."""
    watched = psutil.Process(node) if node else None
    while True:
        time.sleep(1.0)
        idle = time.monotonic() - used[0]
        if (not watched.is_running()) if watched else idle > IDLE_SECONDS:
            Path(address).unlink(missing_ok=True)
            os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
