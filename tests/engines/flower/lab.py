"""A shell in a copy of examples/deployment, with the steps of docs/deploy.md to run in it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from flexlora.experiment.checkpoints import checkpoints, load_checkpoint
from flexlora.federation.state import ServerState

ROOT = Path(__file__).resolve().parents[3]
PORTS = (18443, 19443, 19091, 19092, 19093)
RANKS = {"chain_sum": 4, "letter_counting": 8, "spell_backward": 16}
"""Of the three sites north, south and west."""


def blocks() -> list[str]:
    """The commands of the walk-through, one per step."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    section = text.split("## Two sites on one machine")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)


class Lab:
    """A shell in a copy of the repository's examples, with the walk-through's steps in it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.lab, self.model = folder, folder / "lab", model
        self.public = 19443 if shutil.which("nginx") else 18443
        self.started: list[str] = []
        (folder / "examples").mkdir(parents=True)
        shutil.copytree(ROOT / "examples" / "deployment", folder / "examples" / "deployment")
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT / "src")),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder),
        }

    def run(self, *steps: str, timeout: float = 240) -> str:
        """Steps in one shell, from the first one's folder or the lab; stops at an error."""
        if self.lab.exists():
            before = "cd lab; . ./environment.sh; export FLWR_HOME=$PWD/home-admin\n"
        else:
            before = ""
        script = "set -euo pipefail\n" + before + "\n".join(steps)
        script = script.replace("127.0.0.1:19443", f"127.0.0.1:{self.public}")
        log = self.folder / "shell.log"
        with log.open("ab") as out:
            at = out.tell()
            done = subprocess.run(
                ["bash", "-c", script], cwd=self.folder, env=self.environment,
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=timeout,
            )  # fmt: skip
        said = log.read_bytes()[at:].decode()
        assert done.returncode == 0, said + self.logs()
        return said

    def logs(self) -> str:
        tails = []
        for path in [*self.lab.glob("logs/*.log"), *self.lab.glob("*/errors.log")]:
            tails.append(f"== {path.name}\n" + path.read_text()[-1500:])
        return "\n".join(tails)

    def use(self, model: Path) -> None:
        path = self.lab / "config.yaml"
        path.write_text(path.read_text().replace("smollm2-135m-instruct", str(model)))

    def pid(self, *words: str) -> int:
        """Of the one process that the steps started with these words in its command."""
        for pid in map(int, (self.lab / "pids").read_text().split()):
            if alive(pid) and all(w in " ".join(psutil.Process(pid).cmdline()) for w in words):
                return pid
        raise AssertionError(f"nothing runs with {words}\n" + self.logs())

    def kill(self, *words: str) -> None:
        """SIGKILL to that process and to those it has started."""
        found = psutil.Process(self.pid(*words))
        for process in [found, *found.children(recursive=True)]:
            process.kill()
        found.wait(30)

    def restart(self, *words: str) -> None:
        """End a site's node if it has not ended, and start it again."""
        with contextlib.suppress(AssertionError):
            node = psutil.Process(self.pid(*words))
            node.terminate()
            node.wait(30)
        self.run(next(step for step in self.started if all(w in step for w in words)))

    def stop(self) -> None:
        """End what the steps started, by its ids, and wait for it."""
        pids = self.lab / "pids"
        ours = [int(pid) for pid in pids.read_text().split()] if pids.exists() else []
        for pid in ours:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + 30
        while any(map(alive, ours)) and time.monotonic() < end:
            time.sleep(0.2)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def without_nginx(step: str) -> str:
    """The step, without the proxy where nginx is not installed: nodes then call the SuperLink."""
    if shutil.which("nginx"):
        return step
    lines = step.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("nginx "))
    return "\n".join(lines[:at] + lines[at + 2 :])


def command(step: str, *words: str) -> str:
    """The one command of a step that holds these words, as it stands there."""
    parts = [part + "echo $! >> pids" for part in step.split("echo $! >> pids")[:-1]]
    (found,) = [part for part in parts if all(w in part for w in words)]
    return found.strip()


def submit(output: str, **more: object) -> str:
    terms = " ".join(f"{k.replace('_', '-')}={v}" for k, v in more.items())
    return (
        "flwr run app lab --stream -c "
        f'"config=\\"$PWD/config.yaml\\" output-dir=\\"$PWD/{output}\\" min-nodes=3 {terms}"'
    )


def final(folder: Path) -> ServerState:
    return load_checkpoint(checkpoints(folder / "checkpoints")[-1])[0]


def until(there: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
