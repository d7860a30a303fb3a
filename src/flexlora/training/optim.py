"""AdamW and SGD over slots: torch's own fused kernels, one vector for a whole adapter.

Each slot has its own step count, learning rate and clipping, as its client would have alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adamw import adamw

from flexlora.training.slot import Slot


@dataclass(frozen=True)
class Rule:
    """Which optimiser, with its constants."""

    name: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True, eq=False)
class Moments:
    """AdamW's state of one slot: two moments and the steps made; SGD's is empty."""

    m: Tensor
    v: Tensor
    steps: Float[Tensor, ""]

    @classmethod
    def zeros(cls, slot: Slot, rule: Rule) -> Moments:
        """Fresh state for a client that starts."""
        like = slot.trained if rule.name == "adamw" else slot.trained[:0]
        steps = torch.zeros((), dtype=torch.float32, device=like.device)
        return cls(torch.zeros_like(like), torch.zeros_like(like), steps)


@torch.no_grad()
def clip_(slot: Slot, max_norm: float) -> None:
    """Scale a slot's gradient to at most `max_norm`, as `clip_grad_norm_` does; 0: leave it."""
    if max_norm:
        norm = torch.linalg.vector_norm(slot.grad)
        slot.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


@torch.no_grad()
def step_(slots: Sequence[Slot], states: Sequence[Moments], rate: float, rule: Rule) -> None:
    """One step of slots that share a learning rate; their gradients are zero afterwards."""
    values, grads = [s.trained for s in slots], [s.grad for s in slots]
    if rule.name == "sgd":
        for p, g in zip(values, grads, strict=True):
            p.mul_(1 - rate * rule.weight_decay).add_(g, alpha=-rate)
    else:
        adamw(
            values,
            grads,
            [s.m for s in states],
            [s.v for s in states],
            [],
            [s.steps for s in states],
            fused=True,
            amsgrad=False,
            beta1=rule.betas[0],
            beta2=rule.betas[1],
            lr=rate,
            weight_decay=rule.weight_decay,
            eps=rule.eps,
            maximize=False,
        )
    for slot in slots:
        slot.grad.zero_()
        slot.refresh()
