"""What deployment costs: python benchmarks/deployment.py   (three minutes on two cores)

Asserts that the Flower engine's round is, bit for bit, the embedded engine's, then times. First on
an in-process grid: real Flower messages, deflated and inflated, but no sockets, no TLS, no process
start; server and nodes share one process, so its peak memory holds both sides. Then over real
processes, TLS and node keys (deployment_tls.py). The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import tiny  # noqa: E402
from engines.flower.inproc import InProcess  # noqa: E402

from flexlora.adapter import LoraSpec, initial_adapter, select  # noqa: E402
from flexlora.data.task import Example, Task  # noqa: E402
from flexlora.engines.embedded import Embedded, Prompting  # noqa: E402
from flexlora.engines.flower import node  # noqa: E402
from flexlora.engines.flower.answers import decode_update, encode_update  # noqa: E402
from flexlora.engines.flower.client import make_client_app  # noqa: E402
from flexlora.engines.flower.durable import Durable  # noqa: E402
from flexlora.engines.flower.grid import Flower  # noqa: E402
from flexlora.engines.flower.messages import Parcel  # noqa: E402
from flexlora.engines.flower.wire import decode_payload, digest  # noqa: E402
from flexlora.federation.admission import admit  # noqa: E402
from flexlora.federation.round import Rules, run_round  # noqa: E402
from flexlora.federation.spool import Spool  # noqa: E402
from flexlora.federation.state import Client, Payload, ServerState, Update  # noqa: E402
from flexlora.methods import make  # noqa: E402
from flexlora.training.client import LocalTraining  # noqa: E402
from flexlora.training.models import as_base  # noqa: E402

SIDE = 2048
RANK = 16


def moved(payload: Payload) -> Update:
    """What a client that takes no time would send."""
    adapter = {m: replace(d, B=d.B + 1e-3) for m, d in payload.adapter.items()}
    return Update(payload.client, payload.round, payload.base, adapter, 10, {"loss": 1.0})


def of_size(megabytes: int, nodes: int) -> tuple[ServerState, list[Client]]:
    """A federation whose float32 adapters have about so many megabytes."""
    modules = max(1, round(megabytes * 1e6 / (4 * RANK * 2 * SIDE)))
    shapes = {f"layers.{i}.q_proj": (SIDE, SIDE) for i in range(modules)}
    G = initial_adapter(shapes, dict.fromkeys(shapes, RANK), 0)
    return ServerState(0, "base", G), [Client(f"c{i}", LoraSpec(RANK), 10) for i in range(nodes)]


def llama_3_8b() -> tuple[ServerState, list[Client]]:
    """One client with every linear layer of LLaMA-3-8B at rank 64: 168 million numbers."""
    layer = {
        "q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096),
        "o_proj": (4096, 4096), "gate_proj": (14336, 4096), "up_proj": (14336, 4096),
        "down_proj": (4096, 14336),
    }  # fmt: skip
    shapes = {f"layers.{i}.{name}": shape for i in range(32) for name, shape in layer.items()}
    G = initial_adapter(shapes, dict.fromkeys(shapes, 64), 0)
    return ServerState(0, "base", G, wire="bfloat16"), [Client("c0", LoraSpec(64), 10)]


def through_the_wire() -> dict:
    """That adapter to a node and back, without a round around it."""
    (state, (client,)), seen = llama_3_8b(), []

    def answer(config, kind, asked):
        payload = decode_payload(asked.data)
        update = encode_update(moved(payload), payload, digest(asked.data), "bfloat16")
        seen.append((len(asked.data), len(update)))
        return Parcel({}, update)

    grid = InProcess(make_client_app(answer), [{}])
    flower = Flower(grid, {"c0": 100}, "bfloat16", "r", poll=0.0)
    payload = make("flexlora").downlink(state, client)
    began = time.perf_counter()
    (update,) = flower.train([payload], {"c0": client})
    seconds = time.perf_counter() - began
    assert update.adapter["layers.0.q_proj"].rank == 64
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    down, up = seen[0]
    return {"down": down, "up": up, "seconds": round(seconds, 1), "peak_mib": round(peak)}


class Instant:
    """An embedded engine whose training costs nothing."""

    def train(self, payloads, clients):
        """An answer to each."""
        yield from map(moved, payloads)


def round_cost(megabytes: int, nodes: int, over: str) -> dict:
    """One round in this process: seconds and peak memory."""

    def answer(config, kind, asked):
        payload = decode_payload(asked.data)
        data = encode_update(moved(payload), payload, digest(asked.data), "float32")
        return Parcel({}, data)

    state, clients = of_size(megabytes, nodes)
    grid = InProcess(make_client_app(answer), [{}] * nodes)
    flower = Flower(grid, {c.id: 100 + i for i, c in enumerate(clients)}, run="r", poll=0.0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        engine = Durable(flower, folder / "inbox") if over == "flower" else Instant()
        spool, rules = Spool(1 << 30, folder / "spool"), Rules(cosines=False)
        began = time.perf_counter()
        _, record = run_round(make("flexlora"), state, clients, engine, spool, rules)
        seconds = time.perf_counter() - began
    assert len(record.clients) == nodes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(seconds, 3), "peak_mib": round(peak)}


def admitted_per_second(repeats: int = 20) -> float:
    """Updates of 9 MB from bytes to admitted, one after another."""
    state, (client,) = of_size(9, 1)
    payload = make("flexlora").downlink(state, client)
    data = encode_update(moved(payload), payload, "x", "float32")
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        admit(decode_update(data, payload, "x", "float32"), payload, 10)
        times.append(time.perf_counter() - began)
    return 1 / statistics.median(times)


def training(wire: str, rounds: int = 5) -> dict:
    """The tiny Llama on three clients at ranks 4, 8, 16: Flower against embedded."""
    base, ranks = as_base(tiny.model(), tiny.tokenizer(), "tiny"), {"a": 4, "b": 8, "c": 16}
    settings = LocalTraining(max_steps=8, tokens_per_forward=512, group_size=1)
    prompting = Prompting(max_length=96)
    population = {c: task(c) for c in ranks}
    shapes = {m: base.shapes[m] for m in select(base.shapes, ("q_proj", "v_proj", "down_proj"))}
    clients = [Client(c, LoraSpec(r), 24) for c, r in ranks.items()]
    told = {"training": asdict(settings), "prompting": asdict(prompting), "seed": 0}
    embedded = Embedded(base, population, settings, 0, prompting)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def answer(config, kind, asked):
            place = folder / config["client"]
            site = node.Site(config["client"], base, population, place)
            return node.answer(lambda: site, place, kind, asked)

        grid = InProcess(make_client_app(answer), [{"client": c} for c in ranks])
        nodes = {c: 100 + i for i, c in enumerate(ranks)}
        flower = Flower(grid, nodes, wire, "r", told, poll=0.0)
        spent, states, losses, moved_bytes = {}, {}, {}, 0
        for name, engine in (
            ("embedded", Durable(embedded, folder / "reference", wire)),
            ("flower", Durable(flower, folder / "inbox", wire)),
        ):
            G = initial_adapter(shapes, dict.fromkeys(shapes, 16), 0)
            state, began = ServerState(0, base.fingerprint, G, wire=wire), time.perf_counter()
            for _ in range(rounds):
                spool = Spool(1 << 30, folder / "spool")
                state, record = run_round(make("flexlora"), state, clients, engine, spool)
                if name == "flower":
                    moved_bytes += sum(t.bytes_up + t.bytes_down for t in flower.traffic.values())
            spent[name], states[name] = (time.perf_counter() - began) / rounds, state
            losses[name] = record.metrics["loss_last"]
    for m, g in states["flower"].G.items():
        assert torch.equal(g.B, states["embedded"].G[m].B), m
    return {
        "bytes_per_round": moved_bytes // rounds,
        "loss": round(losses["flower"], 6),
        "seconds_embedded": round(spent["embedded"], 3),
        "seconds_flower": round(spent["flower"], 3),
    }


def task(client: str) -> Task:
    rows = [Example(f"Repeat {client} {i}", "", f"{client} {i % 5}") for i in range(24)]
    return Task(client, client, "words", {"train": 24}, lambda split: rows)


def main() -> None:
    torch.set_num_threads(1)  # two threads on busy cores wait for each other
    wires = {wire: training(wire) for wire in ("float32", "bfloat16")}
    print("bit for bit the embedded engine's, at both precisions\n")
    print(f"{'payload':>8} {'nodes':>5} {'engine':>9} {'s/round':>8} {'peak MiB':>9}")
    sizes = []
    for megabytes in (1, 10, 100):
        for nodes in (1, 3):
            for over in ("embedded", "flower"):
                command = [sys.executable, __file__, str(megabytes), str(nodes), over]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout)
                sizes.append({"mb": megabytes, "nodes": nodes, "engine": over, **found})
                print(
                    f"{megabytes:>5} MB {nodes:>5} {over:>9} {found['seconds']:>8.2f} "
                    f"{found['peak_mib']:>9}"
                )
    command = [sys.executable, __file__, "llama-3-8b"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    llama = json.loads(done.stdout)
    print(f"\nLLaMA-3-8B, rank 64, bfloat16, there and back: {llama}")
    command = [sys.executable, str(Path(__file__).with_name("deployment_tls.py"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tls = json.loads(done.stdout.splitlines()[-1])
    print("\nreal processes, TLS, node keys")
    for row in tls["rounds"]:
        print(
            f"{row['mb']:>5} MB {row['nodes']:>5} nodes {row['seconds']:>8.2f} s/round, of which "
            f"{row['seconds_moving']:.2f} there and back; server app {row['server_mib']} MiB"
        )
    print(f"peak MiB {tls['peak_mib']}, database {tls['database_mb']} MB")
    rate = admitted_per_second()
    print(f"\n{rate:.0f} updates of 9 MB a second from bytes to admitted")
    for wire, found in wires.items():
        print(f"{wire}: {found}")
    about = {"threads": torch.get_num_threads(), "admitted_per_second": round(rate, 1)}
    print(json.dumps({**about, "rounds": sizes, "tls": tls, "wire": wires, "llama_3_8b": llama}))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        torch.set_num_threads(1)  # two threads on busy cores wait for each other
        print(json.dumps(round_cost(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
    elif sys.argv[1:] == ["llama-3-8b"]:
        print(json.dumps(through_the_wire()))
    else:
        main()
