"""The state before round 1: PEFT's initial adapter, or the product of an adapter there is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from flexlora.adapter import Adapter, Shapes, initial_adapter, load_peft
from flexlora.experiment.build import Experiment
from flexlora.experiment.errors import MODEL, blame
from flexlora.federation.state import Client, ServerState, Wire
from flexlora.lowrank import svd


def first_state(experiment: Experiment, fingerprint: str) -> ServerState:
    """PEFT's initial adapter at the largest rank of each module, or the configured warm start.

    Raises:
        Failure: a warm start that does not fit.
    """
    state, folder = cold_state(experiment, fingerprint), experiment.config.lora.warm_start
    if folder is not None:
        ranks = {m: d.rank for m, d in state.G.items()}
        G = warm(Path(folder), experiment.shapes, ranks, fingerprint, state.seed)
        state = replace(state, G=G)
    return experiment.method.start(state)


def cold_state(experiment: Experiment, fingerprint: str) -> ServerState:
    """The initial adapter, before the method has had a say."""
    federation, clients = experiment.config.federation, list(experiment.clients.values())
    return initial_state(fingerprint, experiment.shapes, clients, federation.seed, federation.wire)


def initial_state(
    base: str, shapes: Shapes, clients: Sequence[Client], seed: int = 0, wire: Wire = "float32"
) -> ServerState:
    """PEFT's initial adapter on these modules, at the largest rank that a client has in each.

    Args:
        base: fingerprint of the base model.
        shapes: module path -> `(d_out, d_in)` of the target modules.
        clients: who there is.
        seed: of the run.
        wire: precision at which adapters travel.
    """
    ranks = {m: max(c.lora.rank(m) for c in clients) for m in shapes}
    return ServerState(0, base, initial_adapter(shapes, ranks, seed), seed=seed, wire=wire)


def warm(
    folder: Path, shapes: Shapes, ranks: Mapping[str, int], fingerprint: str, seed: int
) -> Adapter:
    """The products of a PEFT folder in SVD form at the server's ranks.

    Raises:
        Failure: unreadable, made for another base model, or for other modules.
    """
    with blame(MODEL, "lora.warm_start"):
        adapter = load_peft(folder)
        insist_on_base(folder, fingerprint)
        if set(adapter) != set(shapes):
            odd = sorted(set(adapter) ^ set(shapes))
            raise ValueError(
                f"{folder} and lora.target_modules differ in {len(odd)} modules, {odd[:2]}; they "
                "must be the same."
            )
        for module, product in adapter.items():
            if product.shape != shapes[module]:
                raise ValueError(
                    f"{folder}: module {module!r} is {product.shape}, in this base model "
                    f"{shapes[module]}. Use the model it was made with."
                )
        return {m: svd(adapter[m], ranks[m], seed) for m in shapes}


ABOUT = "flexlora.json"
"""Beside an exported adapter: the fingerprint of its base model, which PEFT has no place for."""


def insist_on_base(folder: Path, fingerprint: str) -> None:
    """An adapter that says which base model it was made with must have been made with this one.

    Raises:
        ValueError: another base model.
    """
    about = folder / ABOUT
    made = json.loads(about.read_text())["fingerprint"] if about.is_file() else fingerprint
    if made != fingerprint:
        raise ValueError(
            f"{folder} was made with base model {made}; this one is {fingerprint}. Use the model "
            "it was made with."
        )
