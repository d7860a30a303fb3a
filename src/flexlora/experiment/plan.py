"""`flexlora plan`: what a run will take, from configuration files alone. No weight is loaded.

Clients, ranks, parameters and bytes are exact: every round's cohort is replayed and the tensors
that would travel in a first round are counted. Memory and time are estimates; time takes the speed
of a matrix product on this machine and the length of a few examples.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from flexlora.adapter import num_parameters
from flexlora.experiment.build import Experiment, build
from flexlora.experiment.config import Config
from flexlora.experiment.errors import MODEL, blame
from flexlora.experiment.initial import cold_state
from flexlora.federation.ranks import label
from flexlora.federation.run import enrolled
from flexlora.federation.sampling import cohort, coverage
from flexlora.federation.state import Client, Payload
from flexlora.federation.telemetry import download_bytes, upload_bytes
from flexlora.training.memory import BYTES_PER_TRAINED_NUMBER, MOST_CLIENTS
from flexlora.training.models import outline, resolve_dtype

EFFICIENCY = 0.5
"""Of a large matrix product's speed that training is taken to reach; an assumption."""
CHARACTERS_PER_TOKEN = 3.5


def make_plan(config: Config) -> dict[str, Any]:
    """The plan of a run as plain data.

    Raises:
        Failure: whatever would stop the run before its first round.
    """
    with blame(MODEL, "model"):
        shapes, parameters = outline(config.model.name_or_path)
        device = config.model.device
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        dtype = resolve_dtype(config.model.dtype, device)
    e = build(config, shapes)
    payloads = level_payloads(e)
    traffic = _traffic(e, payloads)
    trained = {name: num_parameters(p.adapter) for name, p in payloads.items()}
    tokens = _tokens_per_round(e)
    seconds = tokens * 4 * parameters / (EFFICIENCY * matmul_speed(device, dtype))
    slots = e.training.group_size
    slots = min(e.schedule.cohort_size, MOST_CLIENTS if slots == "auto" else slots)
    schedule, seed = e.schedule, config.federation.seed
    return {
        "model": config.model.name_or_path,
        "parameters": parameters,
        "method": config.method.name,
        "setting": schedule.setting,
        "clients": {"seen": len(e.seen), "unseen": len(e.unseen)},
        "levels": {
            name: {
                "clients": sum(label(c.lora.r) == name for c in e.clients.values()),
                "trainable_parameters": trained[name],
                "trainable_share": trained[name] / parameters,
                "bytes_down": download_bytes(payload, config.federation.wire),
                "bytes_up": upload_bytes(payload, payload.adapter, config.federation.wire),
            }
            for name, payload in payloads.items()
        },
        "modules": len(e.shapes),
        "rounds": schedule.rounds,
        "clients_per_round": schedule.cohort_size,
        "coverage": str(
            coverage(
                seed, schedule.rounds, list(e.clients), schedule.cohort_size, schedule.drop_out
            )
        ),
        "bytes_per_round": {name: total // schedule.rounds for name, total in traffic.items()},
        "memory_bytes": {
            "base": parameters * dtype.itemsize,
            "clients_at_once": slots * max(trained.values()) * BYTES_PER_TRAINED_NUMBER,
            "server": max(trained.values()) * 4 * 3,
        },
        "tokens_per_round": tokens,
        "seconds_per_round": seconds,
        "seconds_training": seconds * schedule.rounds,
        "notes": list(e.notes),
    }


def level_payloads(e: Experiment) -> dict[str, Payload]:
    """For each distinct rank, small to large, what such a client is sent in round 1."""
    examples: dict[str, Client] = {}
    later = (c for step in e.schedule.changes.values() for c in step.values() if c is not None)
    for client in (*e.clients.values(), *later):
        examples.setdefault(label(client.lora.r), client)
    state = e.method.start(cold_state(e, ""))
    payloads = {name: e.method.downlink(state, client) for name, client in examples.items()}
    return dict(sorted(payloads.items(), key=lambda item: num_parameters(item[1].adapter)))


def _traffic(e: Experiment, payloads: Mapping[str, Payload]) -> dict[str, int]:
    """Bytes up and down over the whole run, every cohort replayed."""
    visits: Counter[str] = Counter()
    for round in range(1, e.schedule.rounds + 1):
        seed, size = e.config.federation.seed, e.schedule.cohort_size
        there = enrolled(list(e.clients.values()), e.schedule, round)
        present = cohort(seed, round, list(there), size, e.schedule.drop_out)
        visits.update(label(there[c].lora.r) for c in present)
    wire = e.config.federation.wire
    return {
        "up": sum(
            n * upload_bytes(payloads[r], payloads[r].adapter, wire) for r, n in visits.items()
        ),
        "down": sum(n * download_bytes(payloads[r], wire) for r, n in visits.items()),
    }


def _tokens_per_round(e: Experiment) -> int:
    """Estimated from the characters of a few clients' examples."""
    limit, lengths = e.config.training.max_length, []
    for id in e.seen[:8]:
        for example in list(e.population[id].load("train"))[:16]:
            text = example.instruction + example.input + example.output
            lengths.append(min(limit, len(text) / CHARACTERS_PER_TOKEN + 16))
    visits = [e.training.draws(c.num_examples) for c in e.clients.values()]
    each = sum(lengths) / len(lengths) * sum(visits) / len(visits)
    return round(each * e.schedule.cohort_size)


def matmul_speed(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a 1,024-wide product; about 0.2 s."""
    x = torch.randn(1024, 1024, device=device).to(dtype)
    (x @ x).sum().item()
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < 0.2:
        (x @ x).sum().item()
        products += 1
    return products * 2 * 1024**3 / (time.perf_counter() - began)


def describe(plan: Mapping[str, Any]) -> str:
    """The plan for people."""
    memory, traffic = plan["memory_bytes"], plan["bytes_per_round"]
    lines = [
        f"{plan['model']}: {plan['parameters'] / 1e6:.1f} M parameters, adapters on "
        f"{plan['modules']} modules; {plan['method']}, {plan['setting']}",
        f"{plan['clients']['seen']} seen and {plan['clients']['unseen']} unseen clients",
        "",
        f"{'rank':>10}{'clients':>9}{'trained':>14}{'share':>9}{'down':>12}{'up':>12}",
    ]
    for name, level in plan["levels"].items():
        lines.append(
            f"{name:>10}{level['clients']:>9}{level['trainable_parameters']:>14,}"
            f"{level['trainable_share']:>9.2%}{_size(level['bytes_down']):>12}"
            f"{_size(level['bytes_up']):>12}"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{plan['rounds']} rounds, {plan['clients_per_round']} clients a round: "
            f"{plan['coverage']}",
            f"on average a round moves {_size(traffic['down'])} down, {_size(traffic['up'])} up",
            f"memory, about: base {_size(memory['base'])}, clients training at once "
            f"{_size(memory['clients_at_once'])}, server {_size(memory['server'])}; "
            "activations come on top",
            f"training, estimated on this machine: {plan['tokens_per_round']:,} tokens and "
            f"{_time(plan['seconds_per_round'])} a round, {_time(plan['seconds_training'])} "
            "in all; evaluation comes on top",
            *plan["notes"],
        ]
    )


def _size(bytes: float) -> str:
    return f"{bytes / 1e9:.2f} GB" if bytes >= 1e9 else f"{bytes / 1e6:.2f} MB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
