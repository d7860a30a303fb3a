"""One cell of a comparison: an ordinary run, and beside it what it cost and how it exports."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexlora.adapter import num_parameters
from flexlora.experiment import runs
from flexlora.experiment.bounds import bounded
from flexlora.experiment.build import BOUNDS, Experiment
from flexlora.experiment.compare.grid import Cell
from flexlora.experiment.config import Config
from flexlora.experiment.console import Console
from flexlora.experiment.errors import RUN, USAGE, Failure
from flexlora.experiment.evaluation import View, measure
from flexlora.experiment.export import final_state, with_patch
from flexlora.experiment.run import proceed, start
from flexlora.experiment.workshop import Workshop, open_workshop
from flexlora.federation.ranks import PAPER_TYPES, About, assign, label
from flexlora.federation.state import Client, Payload, ServerState, floats_down
from flexlora.lowrank import svd
from flexlora.training.memory import BYTES_PER_TRAINED_NUMBER
from flexlora.training.models import Base

ABOUT = "cell.json"
"""Its presence means that a cell is complete."""

ELSEWHERE = {"output_dir": ..., "data": {"path"}, "model": {"name_or_path", "device"}}
"""What may differ when a comparison moves to another machine; the fingerprint still has to fit."""


def run_cell(cell: Cell, export_rank: int | None, console: Console, like: Workshop) -> None:
    """Start a cell, take it up where it was stopped, or find it done.

    Raises:
        Failure: the run cannot go on.
    """
    folder = Path(cell.config.output_dir or "")
    if (folder / ABOUT).is_file():
        return
    console.say(f"\n== {cell.name}")
    if (folder / "config.yaml").is_file():
        proceed(folder, console, like)
    else:
        shutil.rmtree(folder, ignore_errors=True)  # killed before it had a configuration
        start(cell.config, cell.name, console, like)
    shop = bounded(open_workshop(cell.config, folder, console, like))
    runs.write(folder / ABOUT, json.dumps(about(cell, shop, export_rank)))


def insist(folder: Path, config: Config) -> None:
    """A cell that exists must have been made with the same configuration.

    Raises:
        Failure: names the first key that differs.
    """
    if not (folder / "config.yaml").is_file():
        return
    made, wanted = (
        c.model_dump(mode="json", exclude=ELSEWHERE)  # type: ignore[arg-type]
        for c in (runs.open_run(folder), config)
    )
    for section in wanted:
        if made[section] != wanted[section]:
            raise Failure(
                f"{folder} was made with {section} {_short(made[section], wanted[section])}, the "
                f"comparison now says {_short(wanted[section], made[section])}. Cells of one "
                "comparison share their settings: restore them, or use another --output_dir.",
                RUN,
            )


def _short(value: Any, other: Any) -> Any:
    """The keys of a section that differ."""
    if not (isinstance(value, Mapping) and isinstance(other, Mapping)):
        return value
    return {k: v for k, v in value.items() if other.get(k) != v}


def refusal(e: Experiment) -> str:
    """Why a cell that could run is not compared, or an empty string."""
    if e.method.mixed_ranks or e.config.method.name in BOUNDS:
        return ""
    lora: Any = e.config.lora
    about = {c: About(e.population[c].sizes["train"], e.population[c].category) for c in e.seen}
    dealt = assign(e.seen, lora.r, e.config.federation.seed, lora.types or PAPER_TYPES, about)
    held = {label(r) for r in dealt.values()}
    if len(held) < 2:
        return ""
    return (
        f"{e.method.name} needs one rank for everybody; with clients at {', '.join(sorted(held))} "
        "it would be its homogeneous arm a second time."
    )


def about(cell: Cell, shop: Workshop, export_rank: int | None) -> dict[str, Any]:
    """What a finished cell is and cost; plain data."""
    e, method = shop.experiment, shop.experiment.config.method.name
    state = final_state(shop.folder, cell.config)
    rounds = [m for m in runs.read_metrics(shop.folder) if m["kind"] == "round"]
    summary = runs.read(shop.folder / "summary.json")
    bound = method in BOUNDS  # nothing travels, and no client trains as one of a federation
    return {
        "arm": [cell.arm.method, cell.arm.ranks, cell.arm.setting],
        "seed": cell.seed,
        "learning_rate": cell.config.training.learning_rate,
        "bound": bound,
        "citation": e.method.citation,
        "notes": list(e.notes),
        "rounds": len(rounds),
        "seconds": summary["seconds"],
        "server_seconds": sum(r["seconds"].get("aggregate", 0.0) for r in rounds),
        "bytes_up": 0 if bound else sum(r["bytes_up"] for r in rounds),
        "bytes_down": 0 if bound else sum(r["bytes_down"] for r in rounds),
        "flops": flops(e, shop.base, summary.get("tokens") or trained_tokens(rounds)),
        "levels": levels(e, state, shop.base),
        "exported": None if method == "local-only" else exported(shop, state, export_rank),
    }


def levels(e: Experiment, state: ServerState, base: Base) -> dict[str, dict[str, int]]:
    """Clients at each rank, what one trains and holds: weights, frozen terms, factors with AdamW.

    Taken from what the last state would send. Activations come on top; they are the same for all.
    """
    held = sum(p.numel() * p.element_size() for p in base.model.parameters())
    examples: dict[str, Client] = {}
    for client in e.clients.values():
        examples.setdefault(label(client.lora.r), client)
    found = {}
    for name, client in examples.items():
        payload = e.method.downlink(state, client)
        trained = num_parameters(payload.adapter)
        found[name] = {
            "clients": sum(label(c.lora.r) == name for c in e.clients.values()),
            "trained": trained,
            "bytes": held + trained * BYTES_PER_TRAINED_NUMBER + 4 * _frozen(payload),
        }
    return dict(sorted(found.items(), key=lambda item: item[1]["trained"]))


def _frozen(payload: Payload) -> int:
    return floats_down(replace(payload, known="AB"))


def trained_tokens(rounds: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Client -> tokens it trained on in all rounds."""
    found = Counter[str]()
    for r in rounds:
        found.update({c: row["metrics"].get("tokens", 0) for c, row in r["clients"].items()})
    return found


def flops(e: Experiment, base: Base, tokens: Mapping[str, float]) -> float:
    """Of local training: per token 4 for every base weight, 6 for every trained number."""
    weights = sum(p.numel() for p in base.model.parameters())
    sizes = {
        c: sum(client.lora.rank(m) * sum(shape) for m, shape in e.shapes.items())
        for c, client in e.clients.items()
    }
    return sum(count * (4 * weights + 6 * sizes[c]) for c, count in tokens.items())


def exported(shop: Workshop, state: ServerState, rank: int | None) -> dict[str, Any]:
    """The final model truncated to one rank everywhere, as an export to PEFT would be, measured."""
    e, wanted = shop.experiment, shop.experiment.config.evaluation
    rank = rank or min(c.lora.rank(m) for c in e.clients.values() for m in e.shapes)
    whole = with_patch(state, e.method.view(state, None))
    kept = {m: svd(d, min(rank, *d.shape), state.seed) for m, d in whole.items()}
    line = measure(shop, View(kept, {}, state.round), "test", wanted.metrics, wanted.max_clients)
    shop.console.rest()
    return {**line, "view": "exported", "rank": rank}


def open_first(
    cells: Mapping[str, Cell], console: Console
) -> tuple[Workshop | None, dict[str, str]]:
    """Open every cell's configuration once, without running it: the last one, and who is refused.

    Raises:
        Failure: data or a model that cannot be read.
    """
    shop, refused = None, dict[str, str]()
    for name, cell in cells.items():
        try:
            opened = open_workshop(cell.config, Path(), console, shop)
        except Failure as error:
            if error.code != USAGE:
                raise
            refused[name] = str(error)
            continue
        if why := refusal(opened.experiment):
            refused[name] = why
        else:
            shop = opened
    return shop, refused
