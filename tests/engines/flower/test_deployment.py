"""Real Flower processes over TLS with node keys: docs/deploy.md, as it is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flexlora.experiment import runs
from flexlora.experiment.checkpoints import checkpoints, load_checkpoint
from flexlora.federation import ledger
from flexlora.federation.state import ServerState

pytest.importorskip("flwr", reason="needs flwr: pip install 'flexlora[flower]'")
ROOT = Path(__file__).resolve().parents[3]
PORTS = (18443, 19443, 19091, 19092, 19093)


def blocks() -> list[str]:
    """The commands of the walk-through, one per step."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    section = text.split("## Two sites on one machine")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)


class Lab:
    """A shell in a copy of the repository's examples, with the walk-through's steps in it."""

    def __init__(self, folder: Path, model: Path, public: int) -> None:
        self.folder, self.lab, self.model, self.public = folder, folder / "lab", model, public
        (folder / "examples").mkdir(parents=True)
        shutil.copytree(ROOT / "examples" / "deployment", folder / "examples" / "deployment")
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT / "src")),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder),
        }

    def run(self, *steps: str, timeout: float = 400) -> str:
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


@pytest.fixture
def lab(tmp_path, tiny_model_dir) -> Iterator[Lab]:
    for port in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port} is in use")
    public = 19443 if shutil.which("nginx") else 18443
    made = Lab(tmp_path, tiny_model_dir, public)
    yield made
    made.stop()


def without_nginx(step: str) -> str:
    """The step, without the proxy where nginx is not installed: nodes then call the SuperLink."""
    if shutil.which("nginx"):
        return step
    lines = step.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("nginx "))
    return "\n".join(lines[:at] + lines[at + 2 :])


def test_the_walk_through_as_written(lab):
    first, server, operator, sites, run, stop = blocks()
    lab.run(first)
    lab.use(lab.model)
    lab.run(without_nginx(server))
    lab.run(operator)
    lab.run(sites)
    said = lab.run(run)
    assert "finished, 2 of 2 rounds" in said, said + lab.logs()
    assert "rank 8" in said
    admitted = ledger.admitted(lab.lab / "run" / "ledger.jsonl")
    assert admitted == dict.fromkeys((1, 2), ("chain_sum", "letter_counting")), lab.logs()
    summary = runs.read(lab.lab / "run" / "summary.json")
    assert summary["ranks"] == {"chain_sum": [4], "letter_counting": [16]}
    lab.run(stop)


@pytest.mark.deployment
def test_who_is_not_let_in(lab):
    """No key, an unregistered key, a wrong CA, plaintext: the node ends with an error."""
    first, server, operator, *_ = blocks()
    lab.run(first)
    lab.run(without_nginx(server))
    lab.run(operator)
    lab.run(
        "ssh-keygen -q -t ecdsa -b 384 -N '' -f keys/stranger",
        "./certificates.sh wrong localhost 127.0.0.1",
    )
    node = f"flower-supernode --superlink 127.0.0.1:{lab.public} --host 127.0.0.1 --max-retries 2"
    trusted = "--root-certificates certs/ca.crt"
    attempts = {
        "stranger": f"{trusted} --auth-supernode-private-key keys/stranger",
        "no key": trusted,
        "wrong CA": "--root-certificates wrong/ca.crt --auth-supernode-private-key keys/north",
        "plaintext": "--insecure",
    }
    for i, (name, options) in enumerate(attempts.items()):
        home = f"export FLWR_HOME=$PWD/home-{i}; mkdir -p $FLWR_HOME"
        started = f"timeout 60 {node} --port {19300 + i} {options} || echo ended with $?"
        ended = re.search(r"ended with (\d+)", lab.run(home, started))
        assert ended, name
        assert int(ended[1]) != 124, name  # it was still trying
    listed = lab.run("flwr supernode list lab --format json")
    nodes = json.JSONDecoder().raw_decode(listed, listed.index("{"))[0]["nodes"]
    assert {n["status"] for n in nodes} <= {"registered", "offline", "created"}, nodes


@pytest.mark.deployment
@pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx on the PATH")
def test_the_proxy_lets_nobody_else_in(lab):
    first, server, *_ = blocks()
    lab.run(first)
    lab.run(server)
    time.sleep(5)
    fetch = "import ssl, urllib.request, urllib.error\n"
    fetch += "c = ssl.create_default_context(cafile='certs/ca.crt')\n"
    fetch += "for p in ('/', '/docs', '/v1/control/list-runs', '/v1/runtime/acquire-task'):\n"
    fetch += " try: print(urllib.request.urlopen('https://127.0.0.1:19443'+p, context=c).status)\n"
    fetch += " except urllib.error.HTTPError as e: print(e.code)\n"
    (lab.lab / "fetch.py").write_text(fetch)
    assert lab.run("python fetch.py").split() == ["403"] * 4


RANKS = {"chain_sum": 4, "letter_counting": 8, "spell_backward": 16}


@pytest.fixture
def three(lab) -> Lab:
    """Server and three sites at ranks 4, 8 and 16; float32, no evaluation."""
    first, server, operator, sites, *_ = blocks()
    lab.run(first)
    lab.use(lab.model)
    path = lab.lab / "config.yaml"
    text = path.read_text().replace("wire: bfloat16", "wire: float32")
    path.write_text(text.replace("every: 1", "every: 0"))
    lab.run("ssh-keygen -q -t ecdsa -b 384 -N '' -f keys/west; mkdir home-west")
    lab.run(without_nginx(server))
    lab.run(operator, "flwr supernode register keys/west.pub lab --name west")
    south = sites[sites.index("FLWR_HOME=$PWD/home-south") :]
    west = south.replace("south", "west").replace("19092", "19093")
    west = west.replace("letter_counting", "spell_backward").replace('memory=\\"1G\\"', "rank=16")
    lab.run(sites.replace('memory=\\"1G\\"', "rank=8"), west)
    return lab


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


@pytest.mark.deployment
def test_three_sites_are_the_embedded_engine_even_if_the_server_is_killed(three):
    """SIGKILL of the server app in round 1, then the same command again."""
    lab, folder = three, three.lab / "run"
    lab.run(submit("run") + " > logs/first.log 2>&1 &\necho $! >> pids")
    until(lambda: list(folder.glob("inbox/round-*/*.safetensors")))
    superexec = psutil.Process(int((lab.lab / "pids").read_text().split()[1]))
    apps = [p for p in superexec.children(recursive=True) if "flwr-serverapp" in p.name()]
    assert apps
    for app in apps:
        app.kill()
    lab.run(submit("run"))
    assert (folder / "summary.json").is_file(), lab.logs()
    assert ledger.admitted(folder / "ledger.jsonl") == dict.fromkeys((1, 2), tuple(RANKS))

    ranks = json.dumps(RANKS).replace('"', "")
    lab.run(
        "flexlora run config.yaml --output_dir embedded --training.group_size 1 "
        f"--lora.r '{ranks}' --data.families '{list(RANKS)}'"
    )
    state, reference = final(folder), final(lab.lab / "embedded")
    worst = max(float((g.dense() - reference.G[m].dense()).abs().max()) for m, g in state.G.items())
    assert worst <= 1e-6
    assert state.round == reference.round == 2


@pytest.mark.deployment
def test_a_killed_node_is_named_and_the_round_goes_on(three):
    lab, folder = three, three.lab / "run"
    lab.run(submit("run", deadline=40.0) + " > logs/first.log 2>&1 &\necho $! >> pids")
    until(lambda: (folder / "cohorts").is_dir())
    west = int((lab.lab / "pids").read_text().split()[-2])
    for process in [*psutil.Process(west).children(recursive=True), psutil.Process(west)]:
        process.kill()
    until(lambda: (folder / "summary.json").is_file(), 300)
    rounds = [m for m in runs.read_metrics(folder) if m["kind"] == "round"]
    named = {r["client"]: r["reason"] for r in rounds[0]["refused"]}
    assert named.get("spell_backward") in ("late", "offline"), lab.logs()
    assert set(rounds[0]["clients"]) == {"chain_sum", "letter_counting"}
