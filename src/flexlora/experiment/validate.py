"""`flexlora validate`: the data of a configuration, its split, and what leaks through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

from flexlora.data.splits import leakage
from flexlora.experiment.build import build_population
from flexlora.experiment.config import Config
from flexlora.experiment.errors import DATA, blame


def check(config: Config) -> dict[str, Any]:
    """Open the data, split it, read all of it once, and count what seen and unseen share.

    Raises:
        Failure: data that cannot be read, or a seen client without training examples.
    """
    population, seen, unseen = build_population(config)
    sizes = [population[c].sizes.get("train", 0) for c in seen]
    with blame(DATA, "data"):
        found = leakage(population, seen, unseen) if unseen else None
    return {
        "clients": len(population),
        "categories": len({t.category for t in population.values()}),
        "seen": len(seen),
        "unseen": len(unseen),
        "unseen_clients": list(unseen),
        "train_examples": {"min": min(sizes), "median": median(sizes), "max": max(sizes)},
        "without_training_examples": [c for c, n in zip(seen, sizes, strict=True) if n < 1],
        "leakage": None if found is None else {**asdict(found), "text": str(found)},
    }


def describe(found: Mapping[str, Any]) -> str:
    """The same for people."""
    sizes = found["train_examples"]
    lines = [
        f"{found['clients']} clients in {found['categories']} categories: "
        f"{found['seen']} seen, {found['unseen']} unseen",
        f"training examples per seen client: {sizes['min']} to {sizes['max']}, "
        f"median {sizes['median']:g}",
    ]
    if found["without_training_examples"]:
        lines.append(f"without training examples: {found['without_training_examples'][:5]}")
    lines.append(
        found["leakage"]["text"]
        if found["leakage"]
        else "no unseen clients (data.unseen): nothing to leak, and no generalisation to measure"
    )
    return "\n".join(lines)
