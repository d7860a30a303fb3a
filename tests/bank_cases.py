"""A tiny base model and adapters as after some training, for the tests of this room."""

from __future__ import annotations

import tiny
import torch

from flexlora.adapter import LoraSpec, initial_adapter, select
from flexlora.lowrank import LowRank
from flexlora.training.models import Base, as_base

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base_of(dtype: torch.dtype = torch.float64) -> Base:
    return as_base(tiny.model(dtype=dtype), tiny.tokenizer(), "tiny")


def trained_adapter(base: Base, spec: LoraSpec, seed: int = 0) -> dict[str, LowRank]:
    """Factors as after some training: B is not zero."""
    modules = select(base.shapes, TARGETS)
    shapes = {m: base.shapes[m] for m in modules}
    generator = torch.Generator().manual_seed(seed)
    start = initial_adapter(shapes, {m: spec.rank(m) for m in modules}, seed)
    return {
        m: LowRank(0.02 * torch.randn(d.B.shape, generator=generator), d.A, spec.scaling(m)).to(
            base.dtype
        )
        for m, d in start.items()
    }
