"""`flexlora validate`: method, ranks and data of a configuration, and what its split leaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

from flexlora.data.splits import leakage
from flexlora.experiment.build import build
from flexlora.experiment.config import Config
from flexlora.experiment.errors import DATA, MODEL, blame
from flexlora.experiment.trackers import require
from flexlora.experiment.workshop import on_this_machine
from flexlora.federation.ranks import count
from flexlora.training.models import outline


def check(config: Config) -> dict[str, Any]:
    """Deal out the ranks, read all data once, and count what seen and unseen clients share.

    Of the base model only the configuration is read.

    Raises:
        Failure: whatever would stop the run before its first round.
    """
    require(config.report_to)
    with blame(MODEL, "model"):
        on_this_machine(config.model)
        shapes = outline(config.model.name_or_path).shapes
    e = build(config, shapes)
    population, seen, unseen = e.population, e.seen, e.unseen
    sizes = [population[c].sizes.get("train", 0) for c in seen]
    with blame(DATA, "data"):
        found = leakage(population, seen, unseen) if unseen else None
    return {
        "method": config.method.name,
        "modules": len(e.shapes),
        "ranks": count({id: client.lora.r for id, client in e.clients.items()}),
        "notes": list(e.notes),
        "clients": len(population),
        "categories": len({t.category for t in population.values()}),
        "seen": len(seen),
        "unseen": len(unseen),
        "unseen_clients": list(unseen),
        "train_examples": {"min": min(sizes), "median": median(sizes), "max": max(sizes)},
        "leakage": None if found is None else {**asdict(found), "text": str(found)},
    }


def describe(found: Mapping[str, Any]) -> str:
    """The same for people."""
    sizes = found["train_examples"]
    ranks = ", ".join(f"{n} at {rank}" for rank, n in found["ranks"].items())
    lines = [
        f"{found['method']}; clients per rank: {ranks}; they fit all {found['modules']} target "
        "modules",
        *found["notes"],
        f"{found['clients']} clients in {found['categories']} categories: "
        f"{found['seen']} seen, {found['unseen']} unseen",
        f"training examples per seen client: {sizes['min']} to {sizes['max']}, "
        f"median {sizes['median']:g}",
    ]
    lines.append(
        found["leakage"]["text"]
        if found["leakage"]
        else "no unseen clients (data.unseen): nothing to leak, and no generalisation to measure"
    )
    return "\n".join(lines)
