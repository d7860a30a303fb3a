"""The same sums as :mod:`.terms` with three batched products a module: for devices where a launch
costs more than padding. The tokens of each client are padded to the longest, its rank to the
largest; both are zero there, so nothing changes but rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class Stack:
    """One module's factors of all slots: views into the bank's buffers.

    `A`, `B` are in the precision of the activations; `scaling` is zero for an empty slot.
    """

    A: Float[Tensor, "slots rank d_in"]
    B: Float[Tensor, "slots d_out rank"]
    scaling: Float[Tensor, "slots 1 1"]
    dA: Float[Tensor, "slots rank d_in"] | None
    dB: Float[Tensor, "slots d_out rank"] | None


@dataclass(frozen=True, eq=False)
class Grid:
    """Where each slot's tokens stand, padded to the longest.

    Attributes:
        slots: which slots take part.
        gather: position in the flat tokens; padding points at 0.
        real: false at padding.
        scatter: `(tokens,)`: where each token stands in the flattened grid.
    """

    slots: Int[Tensor, " runs"]
    gather: Int[Tensor, "runs longest"]
    real: Bool[Tensor, "runs longest 1"]
    scatter: Int[Tensor, " tokens"]

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int, int]], device: torch.device) -> Grid:
        """From `(slot, start, end)`, which cover all tokens in order.

        >>> Grid.of([(0, 0, 2), (3, 2, 5)], torch.device("cpu")).gather.tolist()
        [[0, 1, 0], [2, 3, 4]]
        """
        starts = torch.tensor([a for _, a, _ in spans])
        sizes = torch.tensor([b - a for _, a, b in spans])
        column = torch.arange(int(sizes.max()))
        real = column[None] < sizes[:, None]
        gather = torch.where(real, starts[:, None] + column[None], 0)
        scatter = real.flatten().nonzero()[:, 0]
        slots = torch.tensor([k for k, _, _ in spans])
        return cls(*(x.to(device) for x in (slots, gather, real[..., None], scatter)))


class AddStacked(torch.autograd.Function):
    """`out[t] += s_k B_k A_k x[t]` for every token `t` of every slot `k`, in place."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Float[Tensor, "*batch d_out"],
        x: Float[Tensor, "tokens d_in"],
        anchor: Tensor,
        stack: Stack,
        grid: Grid,
    ) -> Tensor:
        """See :class:`flexlora.training.terms.AddTerms`."""
        weight = grid.real * stack.scaling[grid.slots].to(x.dtype)
        middle = (x[grid.gather] @ stack.A[grid.slots].mT) * weight
        added = middle @ stack.B[grid.slots].mT
        out.view(-1, out.shape[-1]).add_(added.flatten(0, 1)[grid.scatter])
        ctx.save_for_backward(x, middle, weight)
        ctx.layout = stack, grid
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """`dB_k += g^T h`, `dA_k += s (g B_k)^T x`, `dx = s g B_k A_k`; gathers, no atomics."""
        x, middle, weight = ctx.saved_tensors
        stack, grid = ctx.layout
        g = grad.reshape(x.shape[0], -1)[grid.gather]
        if stack.dB is not None:
            stack.dB.index_add_(0, grid.slots, (g.mT @ middle).to(stack.dB.dtype))
        back = (g @ stack.B[grid.slots]) * weight
        if stack.dA is not None:
            stack.dA.index_add_(0, grid.slots, (back.mT @ x[grid.gather]).to(stack.dA.dtype))
        dx = None
        if ctx.needs_input_grad[1]:
            dx = (back @ stack.A[grid.slots]).flatten(0, 1)[grid.scatter]
        return grad, dx, None, None, None
