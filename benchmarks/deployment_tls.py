"""Payloads over real Flower processes with TLS and node keys; benchmarks/deployment.py runs it.

SuperLink, proxy where nginx is installed, three nodes with their workers: the walk-through of
docs/deploy.md on one machine. The worker's training is replaced by one that takes no time, so that
what is left is moving: `deployment_tls.py worker FOLDER` is such a worker, `server_app` the loop.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "tests")]

from deployment import moved, of_size  # noqa: E402
from flwr.app import Context  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402

from flexlora.engines.flower.answers import encode_update  # noqa: E402
from flexlora.engines.flower.durable import Durable  # noqa: E402
from flexlora.engines.flower.grid import Flower  # noqa: E402
from flexlora.engines.flower.messages import Parcel  # noqa: E402
from flexlora.engines.flower.wire import decode_payload, digest  # noqa: E402
from flexlora.experiment import site, worker  # noqa: E402
from flexlora.federation.round import Rules, run_round  # noqa: E402
from flexlora.federation.spool import Spool  # noqa: E402
from flexlora.methods import make  # noqa: E402

SIZES = [(1, 3), (1, 1), (1, 3), (10, 1), (10, 3), (100, 1), (100, 3)]
"""Megabytes and nodes; the first one only warms up."""

APP = """
[project]
name = "flexlora-benchmark"
version = "0.1.0"
description = "Payloads"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "flexlora"
[tool.flwr.app.components]
serverapp = "deployment_tls:server_app"
clientapp = "flexlora.flower:client_app"
[tool.flwr.app.config]
output = ""
"""

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Rounds of every size, a line of JSON each."""
    while len(nodes := sorted(grid.get_node_ids())) < 3:
        time.sleep(0.5)
    for turn, (megabytes, count) in enumerate(SIZES):
        state, clients = of_size(megabytes, count)
        flower = Flower(grid, {f"c{i}": n for i, n in enumerate(nodes)}, run=f"r{turn}")
        with tempfile.TemporaryDirectory() as scratch:
            engine = Durable(flower, Path(scratch) / "inbox")
            spool, rules = Spool(1 << 30, Path(scratch) / "spool"), Rules(cosines=False)
            began = time.perf_counter()
            _, record = run_round(make("flexlora"), state, clients, engine, spool, rules)
            seconds = time.perf_counter() - began
        assert len(record.clients) == count, record.refused
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        line = {"mb": megabytes, "nodes": count, "seconds": round(seconds, 2)}
        line |= {"seconds_moving": round(record.seconds["train"], 2), "server_mib": round(peak)}
        with Path(str(context.run_config["output"])).open("a") as out:
            out.write(json.dumps(line) + "\n")


def at_once(settings: object, kind: str, asked: Parcel) -> Parcel:
    """A site whose training takes no time."""
    payload = decode_payload(asked.data)
    return Parcel({}, encode_update(moved(payload), payload, digest(asked.data), "float32"))


def over_tls(folder: Path) -> dict:
    """All sizes, on processes that are started and ended here."""
    import psutil
    from engines.flower.lab import Lab, blocks, command, without_nginx

    lab = Lab(folder, folder)
    lab.environment["PYTHONPATH"] += f":{HERE}"
    first, server, operator, sites, *_ = blocks()
    workers = []
    try:
        lab.run(first, "ssh-keygen -q -t ecdsa -b 384 -N '' -f keys/west; mkdir home-west")
        (lab.lab / "app" / "pyproject.toml").write_text(APP)
        lab.run(without_nginx(server))
        lab.run(operator, "flwr supernode register keys/west.pub lab --name west")
        south = command(sites, "keys/south")
        west = south.replace("south", "west").replace("19092", "19093")
        for name in ("north", "south", "west"):
            words = [sys.executable, __file__, "worker", str(lab.lab / name)]
            workers.append(subprocess.Popen(words, env=lab.environment))
        lab.run(command(sites, "keys/north"), south, west)
        output = lab.lab / "rounds.jsonl"
        lab.run(f'flwr run app lab --stream -c "output=\\"{output}\\""', timeout=400)
        peaks = {
            name: high_water(psutil.Process(lab.pid(words)))
            for name, words in (("superlink", "flower-superlink"), ("node", "keys/north"))
        }
        database = sum(path.stat().st_size for path in lab.lab.glob("link.db*"))
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        return {"rounds": lines[1:], "peak_mib": peaks, "database_mb": round(database / 1e6)}
    finally:
        lab.stop()
        for process in workers:
            process.terminate()
            process.wait()


def high_water(process: object) -> int:
    """Peak resident MiB of another process, where Linux tells it."""
    status = Path(f"/proc/{process.pid}/status").read_text()  # type: ignore[attr-defined]
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["worker"]:
        site.answer = at_once
        place = Path(sys.argv[2])
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        worker.serve(worker.socket_of(place), 0)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(over_tls(Path(scratch))))
