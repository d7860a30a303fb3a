"""AdamW and SGD over a bank: each slot has its own step count, learning rate and clipping.

Torch's own optimisers keep one step count per tensor; the slots of a stacked tensor are at
different steps when clients join and leave. The update rules are theirs, term for term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Params = Sequence[Tensor]
"""Stacked factors, slots first, with gradients."""


@dataclass(frozen=True)
class Rule:
    """Which optimiser, with its constants."""

    name: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(eq=False)
class Moments:
    """AdamW's state: `m`, `v` beside each parameter, and the steps each slot has made."""

    m: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    @classmethod
    def zeros(cls, params: Params, rule: Rule) -> Moments:
        """Fresh state; SGD keeps none."""
        kept = params if rule.name == "adamw" else ()
        return cls(
            [torch.zeros_like(p) for p in kept],
            [torch.zeros_like(p) for p in kept],
            [0] * params[0].shape[0],
        )

    def reset(self, slot: int) -> None:
        """Forget a slot: its next client starts afresh."""
        for x in (*self.m, *self.v):
            x[slot].zero_()
        self.steps[slot] = 0


@torch.no_grad()
def clip_(params: Params, max_norm: float) -> Float[Tensor, " slots"]:
    """Scale each slot's gradient to at most `max_norm`, as `clip_grad_norm_` would alone.

    Returns the norms before clipping; `max_norm = 0` leaves the gradients as they are.
    """
    grads = [p.grad for p in params if p.grad is not None]
    squares = torch.stack([g.square().flatten(1).sum(1) for g in grads])
    norms = squares.sum(0).sqrt()
    if max_norm:
        shrink = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        for g in grads:
            g.mul_(_per_slot(shrink, g))
    return norms


@torch.no_grad()
def step_(params: Params, rates: Sequence[float], state: Moments, rule: Rule) -> None:
    """One step of every slot at its own rate (0: an idle slot), then drop the gradients."""
    state.steps = [n + 1 for n in state.steps]
    like = params[0]
    lr = torch.tensor(rates, dtype=like.dtype, device=like.device)
    b1, b2 = rule.betas
    steps = torch.tensor(state.steps, dtype=torch.float64)
    correction1 = (1 - b1**steps).to(like)
    correction2 = (1 - b2**steps).sqrt().to(like)
    for i, p in enumerate(params):
        g = p.grad
        if g is None:
            continue
        if rule.weight_decay:
            p.mul_(_per_slot(1 - lr * rule.weight_decay, p))
        if rule.name == "sgd":
            p.sub_(_per_slot(lr, p) * g)
        else:
            m, v = state.m[i].lerp_(g, 1 - b1), state.v[i].mul_(b2).addcmul_(g, g, value=1 - b2)
            denominator = v.sqrt().div_(_per_slot(correction2, v)).add_(rule.eps)
            p.sub_(_per_slot(lr / correction1, p) * m / denominator)
        p.grad = None


def _per_slot(values: Float[Tensor, " slots"], like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
