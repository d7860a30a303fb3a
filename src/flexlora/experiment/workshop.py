"""What a run works with: made from a configuration, for a start, a resume, an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flexlora.engines.embedded import Embedded, Prompting
from flexlora.experiment.build import Experiment, build
from flexlora.experiment.config import Config, Model
from flexlora.experiment.console import Console
from flexlora.experiment.errors import MODEL, blame
from flexlora.federation.state import ServerState
from flexlora.training.client import Progress
from flexlora.training.devices import replica, resolve_devices
from flexlora.training.models import Base, load_base, outline, resolve_dtype
from flexlora.training.quantized import quantization


@dataclass(frozen=True)
class Workshop:
    """An experiment with its base model loaded.

    Attributes:
        folder: of the run.
        experiment: what the configuration means.
        base: the frozen model.
        engine: trains and evaluates.
        console: where people read.
    """

    folder: Path
    experiment: Experiment
    base: Base
    engine: Embedded
    console: Console


def open_workshop(
    config: Config, folder: Path, console: Console, like: Workshop | None = None
) -> Workshop:
    """Load the base model and the data of a configuration.

    Args:
        config: checked.
        folder: of the run.
        console: where people read.
        like: an open workshop, whose base model and data are used again where they are the same.

    Raises:
        Failure: with the code of what is wrong.
    """
    model = config.model
    known = like.base if like is not None and like.experiment.config.model == model else None
    if not known:
        console.progress(f"loading {model.name_or_path}")
    with blame(MODEL, "model"):
        devices, _, options = on_this_machine(model)
        shapes = known.shapes if known else outline(model.name_or_path).shapes
    experiment = build(config, shapes, like.experiment if like else None)  # before any weight
    if like is not None and known:
        base, replicas = known, like.engine.replicas
    else:
        with blame(MODEL, "model"):
            base = load_base(model.name_or_path, model.dtype, devices[0], **options)
            replicas = tuple(replica(base, device) for device in devices[1:])
    prompting = Prompting(
        config.data.template,
        config.training.max_length,
        config.training.train_on_prompt,
        config.data.system,
    )

    def on_step(step: Progress) -> None:
        console.progress(
            f"training: {step.clients_done} of {step.clients} clients done, "
            f"loss {step.loss:.3f}, {step.tokens / max(step.seconds, 1e-9):.0f} tokens/s"
        )

    engine = Embedded(
        base,
        experiment.population,
        experiment.training,
        config.federation.seed,
        prompting,
        on_step,
        replicas=replicas,
    )
    return Workshop(folder, experiment, base, engine, console)


def on_this_machine(model: Model) -> tuple[list[str], torch.dtype, dict[str, Any]]:
    """Devices, dtype and quantization of a base model as this machine has them; reads no weight.

    Raises:
        ModelError: what it does not have.
    """
    devices = resolve_devices(model.devices)
    dtype = resolve_dtype(model.dtype, devices[0])
    return devices, dtype, quantization(model.bits, dtype, model.devices[0])


def settle(shop: Workshop, state: ServerState) -> dict[str, int]:
    """What `auto` stands for on this machine, so that a resume elsewhere computes the same bits."""
    e = shop.experiment
    widest = max(e.clients.values(), key=lambda c: sum(c.lora.rank(m) for m in e.shapes))
    return shop.engine.sizes([e.method.downlink(state, widest)] * e.schedule.cohort_size)


def settled(shop: Workshop, sizes: Mapping[str, int]) -> Workshop:
    """The same workshop with these sizes in place of `auto`."""
    return replace(shop, engine=shop.engine.settled(sizes))
