"""Checkpoints: a folder per round, written beside its final place and renamed, so never half there.

A checkpoint is `state.safetensors` (every tensor of the :class:`ServerState`) and `state.json` (all
the rest, with the size of the tensors' file), and `memory.safetensors` where clients keep something
between rounds. All are flushed to the disk before the rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexlora.experiment.errors import RUN, Failure, blame
from flexlora.federation.state import ServerState, Term
from flexlora.lowrank import LowRank

FORMAT = 1
EMPTY: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Progress:
    """What the loop knows beside the server's state; plain data.

    Attributes:
        metrics_bytes: length of `metrics.jsonl` at this round; a resume cuts the file to it.
        seconds: spent on the run so far.
        best_round: round with the best monitored loss, 0 if none was measured.
        best_loss: that loss.
        stale: evaluations since.
        sizes: what `auto` settings stood for when the run began.
        ranks: client id -> the distinct ranks its model really had.
    """

    metrics_bytes: int = 0
    seconds: float = 0.0
    best_round: int = 0
    best_loss: float | None = None
    stale: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    ranks: Mapping[str, list[int]] = field(default_factory=dict)


def save_checkpoint(
    folder: Path, state: ServerState, progress: Progress, memory: Mapping[str, Tensor] = EMPTY
) -> Path:
    """Write `folder/round-00007`, all of it or nothing.

    Args:
        folder: of the checkpoints.
        state: of the server, after the round.
        progress: what the loop knows beside it.
        memory: what the engine keeps for clients, by name.

    Raises:
        Failure: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = folder / f"round-{state.round:05d}"
    scratch = folder / f".writing-{os.getpid()}"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        tensors, rest = pack(state)
        save_file(tensors, scratch / "state.safetensors")
        if memory:
            kept = {name: tensor.clone().contiguous() for name, tensor in memory.items()}
            save_file(kept, scratch / "memory.safetensors")
        rest |= {"format": FORMAT, "progress": vars(progress)}
        rest["bytes"] = (scratch / "state.safetensors").stat().st_size
        (scratch / "state.json").write_text(json.dumps(rest))
        for path in (*scratch.iterdir(), scratch):
            flush(path)
        if target.exists():  # of a run that went on from here before: the same bits
            shutil.rmtree(target)
        os.rename(scratch, target)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise Failure(
            f"checkpoint of round {state.round} in {folder}: {error}. Earlier checkpoints are "
            f"intact; make room, then: flexlora resume {folder.parent}",
            RUN,
        ) from error
    return target


def load_checkpoint(folder: Path) -> tuple[ServerState, Progress]:
    """Read one back, bit for bit.

    Raises:
        Failure: incomplete, or written by another version of the format.
    """
    try:
        rest = json.loads((folder / "state.json").read_text())
        if rest["format"] != FORMAT:
            raise Failure(f"{folder}: format {rest['format']}; this version reads {FORMAT}.", RUN)
        size = (folder / "state.safetensors").stat().st_size
        if size != rest["bytes"]:
            raise ValueError(f"state.safetensors has {size} bytes, expected {rest['bytes']}")
        loaded = load_file(folder / "state.safetensors")
        # Own memory, as torch aligns it: at other alignments matrix products round differently.
        state = unpack({name: tensor.clone() for name, tensor in loaded.items()}, rest)
        return state, Progress(**rest["progress"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Failure(
            f"checkpoint {folder} cannot be read: {error}. Remove that folder to go on from the "
            "checkpoint before it.",
            RUN,
        ) from error


def load_memory(folder: Path) -> dict[str, Tensor]:
    """What the engine kept for clients; empty for methods whose clients keep nothing.

    Raises:
        Failure: unreadable.
    """
    path = folder / "memory.safetensors"
    with blame(RUN, str(path), (OSError, SafetensorError)):
        return load_file(path) if path.is_file() else {}


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("round-*") if (p / "state.json").is_file())


def prune(folder: Path, keep_last: int, best_round: int) -> None:
    """Delete all but the latest `keep_last` and the best."""
    for path in checkpoints(folder)[:-keep_last]:
        if path.name != f"round-{best_round:05d}":
            shutil.rmtree(path)


def pack(state: ServerState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state as flat tensors and plain data."""
    tensors = {f"aux/{name}": tensor for name, tensor in state.aux.items()}
    scaling: dict[str, float | None] = {}  # None: a dense term
    for kind, terms in (("G", state.G), ("patch", state.patch)):
        for module, term in terms.items():
            key = f"{kind}/{module}"
            scaling[key] = term.scaling if isinstance(term, LowRank) else None
            if isinstance(term, LowRank):
                tensors[f"{key}/B"], tensors[f"{key}/A"] = term.B, term.A
            else:
                tensors[key] = term
    # Own memory: views of one factorisation share theirs, which the format refuses.
    tensors = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    rest = {"round": state.round, "base": state.base, "seed": state.seed, "wire": state.wire}
    return tensors, {**rest, "scaling": scaling, "aux": list(state.aux)}


def unpack(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> ServerState:
    """Inverse of :func:`pack`; the order of modules is kept."""
    G: dict[str, LowRank] = {}
    patch: dict[str, Term] = {}
    for key, scaling in rest["scaling"].items():
        kind, _, module = key.partition("/")
        if scaling is None:
            patch[module] = tensors[key]
        else:
            (G if kind == "G" else patch)[module] = LowRank(
                tensors[f"{key}/B"], tensors[f"{key}/A"], scaling
            )
    aux = {name: tensors[f"aux/{name}"] for name in rest["aux"]}
    return ServerState(rest["round"], rest["base"], G, patch, aux, rest["seed"], rest["wire"])


def flush(path: Path) -> None:
    """Ask the disk to really have a file or a folder's entries."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders; its rename is journalled
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
