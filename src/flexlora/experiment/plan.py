"""`flexlora plan`: what a run will take, from configuration files alone. No weight is loaded.

Clients, ranks, parameters and bytes are exact: every round's cohort is replayed and the tensors
that would travel in a first round are counted. Memory and time are estimates (see `forecast`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from flexlora.adapter import num_parameters
from flexlora.experiment.build import BOUNDS, Experiment, build
from flexlora.experiment.config import Config
from flexlora.experiment.errors import DATA, MODEL, blame
from flexlora.experiment.forecast import lengths, matmul_speed, memory, seconds
from flexlora.experiment.initial import cold_state
from flexlora.experiment.trackers import require
from flexlora.experiment.workshop import on_this_machine
from flexlora.federation.ranks import label
from flexlora.federation.run import enrolled
from flexlora.federation.sampling import cohort, coverage
from flexlora.federation.state import Client, Payload
from flexlora.federation.telemetry import download_bytes, upload_bytes
from flexlora.training.memory import Size
from flexlora.training.models import outline


def make_plan(config: Config) -> dict[str, Any]:
    """The plan of a run as plain data.

    Raises:
        Failure: whatever would stop the run before its first round.
    """
    require(config.report_to)
    with blame(MODEL, "model"):
        (first, *_), dtype, _ = on_this_machine(config.model)
        model = outline(config.model.name_or_path)
    device = torch.device(first)
    e = build(config, model.shapes)
    payloads = level_payloads(e)
    trained = {name: num_parameters(p.adapter) for name, p in payloads.items()}
    cohorts = [c for c in _cohorts(e) if c]
    with blame(DATA, "data"):
        mean = lengths(e)
    visits = sum(e.training.draws(c.num_examples) for cohort in cohorts for c in cohort)
    tokens, schedule = visits * mean.tokens / e.schedule.rounds, e.schedule
    size = Size.of(model.config)
    speed = matmul_speed(size.hidden, size.wide, device, dtype)
    registered = (config.federation.seed, schedule.rounds, list(e.clients), schedule.cohort_size)
    return {
        "model": config.model.name_or_path,
        "parameters": model.parameters,
        "method": config.method.name,
        "setting": schedule.setting,
        "clients": {"seen": len(e.seen), "unseen": len(e.unseen)},
        "levels": {name: _level(e, name, payloads[name], model.parameters) for name in payloads},
        "modules": len(e.shapes),
        "rounds": schedule.rounds,
        "clients_per_round": schedule.cohort_size,
        "coverage": str(coverage(*registered, schedule.drop_out)),
        "bytes_per_round": _traffic(e, payloads, cohorts),
        "memory_bytes": memory(
            e, model, [[trained[label(c.lora.r)] for c in x] for x in cohorts], mean, device, dtype
        ),
        "tokens_per_round": round(tokens),
        "seconds": seconds(e, model, tokens, mean, speed),
        "flops_per_second": speed,
        "notes": [*e.notes, *caveats(e)],
    }


def _level(e: Experiment, name: str, payload: Payload, parameters: int) -> dict[str, float]:
    """What clients of one rank hold and send."""
    trained, wire = num_parameters(payload.adapter), e.config.federation.wire
    return {
        "clients": sum(label(c.lora.r) == name for c in e.clients.values()),
        "trainable_parameters": trained,
        "trainable_share": trained / parameters,
        "bytes_down": download_bytes(payload, wire),
        "bytes_up": upload_bytes(payload, payload.adapter, wire),
    }


def caveats(e: Experiment) -> Iterator[str]:
    """Where a first round's bytes are not those of every round."""
    name = e.config.method.name
    if name in BOUNDS:
        yield f"{name} sends nothing: rounds and bytes are those of the federation it bounds."
    elif e.method.averages == "patch":
        yield f"bytes down are those of round 1; under {name} they grow: {e.method.down}."


def level_payloads(e: Experiment) -> dict[str, Payload]:
    """For each distinct rank, small to large, what such a client is sent in round 1."""
    examples: dict[str, Client] = {}
    later = (c for step in e.schedule.changes.values() for c in step.values() if c is not None)
    for client in (*e.clients.values(), *later):
        examples.setdefault(label(client.lora.r), client)
    state = e.method.start(cold_state(e, ""))
    payloads = {name: e.method.downlink(state, client) for name, client in examples.items()}
    return dict(sorted(payloads.items(), key=lambda item: num_parameters(item[1].adapter)))


def _cohorts(e: Experiment) -> list[list[Client]]:
    """Who takes part in each round, at the rank of that round."""
    seed, schedule, found = e.config.federation.seed, e.schedule, []
    for round in range(1, schedule.rounds + 1):
        there = enrolled(list(e.clients.values()), schedule, round)
        present = cohort(seed, round, list(there), schedule.cohort_size, schedule.drop_out)
        found.append([there[c] for c in present])
    return found


def _traffic(
    e: Experiment, payloads: Mapping[str, Payload], cohorts: Sequence[Sequence[Client]]
) -> dict[str, int]:
    """Mean bytes up and down of a round."""
    visits = Counter(label(client.lora.r) for present in cohorts for client in present)
    wire = e.config.federation.wire
    up = sum(n * upload_bytes(payloads[r], payloads[r].adapter, wire) for r, n in visits.items())
    down = sum(n * download_bytes(payloads[r], wire) for r, n in visits.items())
    return {"up": up // e.schedule.rounds, "down": down // e.schedule.rounds}


def describe(plan: Mapping[str, Any]) -> str:
    """The plan for people."""
    held, traffic, took = plan["memory_bytes"], plan["bytes_per_round"], plan["seconds"]
    product = took["server_per_round"] > 0
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
            f"memory while training, estimated: {_size(held['peak'])}: base "
            f"{_size(held['base'])}, clients training at once {_size(held['clients'])}, "
            f"activations {_size(held['activations'])}; Python and its libraries come on top",
            f"time, estimated on this machine: {_time(took['total'])} in all; a round "
            f"{_time(took['training_per_round'])} for {plan['tokens_per_round']:,} tokens"
            + (f", {_time(took['server_per_round'])} at the server" if product else "")
            + f"; all evaluations {_time(took['evaluation'])}",
            *plan["notes"],
        ]
    )


def _size(bytes: float) -> str:
    return f"{bytes / 1e9:.2f} GB" if bytes >= 1e9 else f"{bytes / 1e6:.2f} MB"


def _time(seconds: float) -> str:
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
