"""A run's model for the world outside: a PEFT folder at any rank, or the merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch

from flexlora.adapter import Adapter, save_peft
from flexlora.experiment.build import build_method
from flexlora.experiment.checkpoints import checkpoints, load_checkpoint
from flexlora.experiment.config import Config
from flexlora.experiment.errors import MODEL, RUN, USAGE, Failure, blame
from flexlora.experiment.initial import ABOUT
from flexlora.experiment.runs import open_run, read
from flexlora.federation.state import Method, ServerState
from flexlora.federation.telemetry import singular_values
from flexlora.lowrank import LowRank, stack


def export_run(
    folder: Path,
    to: Path,
    rank: int | None = None,
    energy: float | None = None,
    merged: bool = False,
) -> str:
    """Write a run's model to a new folder; returns a sentence about what is there.

    Args:
        folder: of the run.
        to: must not exist.
        rank: of every module; by default the largest the run trained.
        energy: instead of a rank: the smallest that keeps this share of each module's update.
        merged: the whole base model with the update added to its weights, in float32.

    Raises:
        Failure: `to` exists, a rank no module can have, or both rank and energy.
    """
    if to.exists():
        raise Failure(f"{to} exists; nothing is overwritten. Name a folder that is not there.", RUN)
    if rank is not None and energy is not None:
        raise Failure(f"--rank {rank} and --energy {energy}: give one of them.", USAGE)
    config, about = open_run(folder), read(folder / "run.json")
    state = final_state(folder, config)
    with blame(USAGE, "method"):
        method = build_method(config)
    adapter = with_patch(state, method.view(state, None))
    if merged:
        if config.model.bits:
            raise Failure(
                f"--merged: the base of {folder} is held in {config.model.bits} bits; export the "
                "adapter and merge it into the whole weights with PEFT.",
                USAGE,
            )
        return _merge(config.model.name_or_path, config.model.devices[0], adapter, state, to)
    if energy is not None:
        rank = rank_for(adapter, energy)
    write_adapter(to, adapter, state, about["base"], rank)
    kept = rank or json.loads((to / "adapter_config.json").read_text())["r"]
    return f"{to}: PEFT adapter of rank {kept} for {about['base']}, after round {state.round}"


def final_state(folder: Path, config: Config) -> ServerState:
    """What a run ended with, or has come to: its last checkpoint, or its best where that is wanted.

    Raises:
        Failure: no checkpoint yet.
    """
    saved = checkpoints(folder / "checkpoints")
    if not saved:
        raise Failure(f"{folder} has no checkpoint yet; flexlora resume {folder} goes on.", RUN)
    state, progress = load_checkpoint(saved[-1])
    if config.checkpoints.load_best_at_end and progress.best_round:
        state, _ = load_checkpoint(saved[-1].with_name(f"round-{progress.best_round:05d}"))
    return state


def save_adapter(to: Path, method: Method, state: ServerState, base: str) -> None:
    """The whole global update as a PEFT folder at its own largest rank."""
    write_adapter(to, with_patch(state, method.view(state, None)), state, base)


def write_adapter(
    to: Path, adapter: Adapter, state: ServerState, base: str, rank: int | None = None
) -> None:
    """A PEFT folder, with a note of the base model it belongs to.

    Raises:
        Failure: a rank no module can have, or a full disk.
    """
    with blame(RUN, f"writing {to}"):
        save_peft(adapter, to, rank, base, state.seed)
        about = {"fingerprint": state.base, "round": state.round}
        (to / ABOUT).write_text(json.dumps(about) + "\n")


def with_patch(state: ServerState, adapter: Adapter) -> dict[str, LowRank]:
    """The whole update, `patch + adapter`, as products."""
    whole = dict(adapter)
    for module, term in state.patch.items():
        if not isinstance(term, LowRank):
            term = LowRank(term, torch.eye(term.shape[1], dtype=term.dtype))
        whole[module] = stack([term, whole[module]]) if module in whole else term
    return whole


def rank_for(adapter: Adapter, energy: float) -> int:
    """The smallest uniform rank at which every module keeps the share `energy` of its `sum S^2`.

    Raises:
        Failure: a share that is not above 0 and at most 1.
    """
    if not 0 < energy <= 1:
        raise Failure(f"--energy {energy}; expected a share above 0 and at most 1.", USAGE)
    needed = 1
    for product in adapter.values():
        kept = (singular_values(product).double() ** 2).cumsum(0)
        if kept[-1] > 0:
            enough = kept >= energy * kept[-1] * (1 - 1e-12)
            needed = max(needed, int(enough.int().argmax()) + 1)
    return needed


def _merge(model: str, device: str, adapter: Adapter, state: ServerState, to: Path) -> str:
    from flexlora.training.models import load_base

    with blame(MODEL, "model"):
        base = load_base(model, "float32", device)
    if base.fingerprint != state.base:
        raise Failure(
            f"model {model!r} has fingerprint {base.fingerprint}; the run was made with "
            f"{state.base}. Restore that model.",
            MODEL,
        )
    for name, product in adapter.items():
        layer = cast(Any, base.model.get_submodule(name))
        update = product.to(device=base.device).dense()
        transposed = type(layer).__name__ == "Conv1D"  # GPT-2 stores (d_in, d_out)
        with torch.no_grad():
            layer.weight += update.T if transposed else update
    with blame(RUN, f"writing {to}"):
        base.model.save_pretrained(to)
        base.tokenizer.save_pretrained(to)
    return f"{to}: {base.name} with the update of round {state.round} merged in, float32"
