"""What a client adds to one layer's output, forward and backward, in place and without copies.

Autograd over slices would keep a copy of `x` per client and module, and fill a gradient as wide as
the whole bank for every forward. Here a forward adds to the layer's own output, and a backward adds
to the client's own gradient buffers: `x`, which the layer below holds anyway, and the
`(tokens, rank)` middle are all that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexlora.federation.state import Term as FrozenTerm
from flexlora.lowrank import LowRank


class Term(Protocol):
    """A linear map on the tokens of one client."""

    def forward_(self, out: Tensor, x: Tensor) -> Tensor | None:
        """Add the map of `x` to `out`; what the backward needs beside `x`."""

    def backward_(
        self, grad: Tensor, x: Tensor, middle: Tensor | None, dx: Tensor | None, beta: int
    ) -> None:
        """Add to the term's own gradients; `dx = beta dx + its gradient`, where it is wanted."""


@dataclass(eq=False)
class Lora:
    """`s B A`; gradients go to `dA`, `dB`, in their precision (None: not trained)."""

    A: Float[Tensor, "rank d_in"]
    B: Float[Tensor, "d_out rank"]
    scaling: float
    dA: Float[Tensor, "rank d_in"] | None = None
    dB: Float[Tensor, "d_out rank"] | None = None

    def forward_(self, out: Tensor, x: Tensor) -> Tensor | None:
        """`out += s (x A^T) B^T`."""
        middle = x @ self.A.T
        out.addmm_(middle, self.B.T, alpha=self.scaling)
        return middle

    def backward_(
        self, grad: Tensor, x: Tensor, middle: Tensor | None, dx: Tensor | None, beta: int
    ) -> None:
        """`dB += s g^T h`, `dA += s (g B)^T x`, `dx += s g B A`."""
        if self.dB is not None and middle is not None:
            self.dB.add_(grad.T @ middle, alpha=self.scaling)
        if self.dA is None and dx is None:
            return
        back = (grad @ self.B).mul_(self.scaling)
        if self.dA is not None:
            self.dA.add_(back.T @ x)
        if dx is not None:
            dx.addmm_(back, self.A, beta=beta)


@dataclass(eq=False)
class Sparse:
    """A matrix that is zero but at a mask's positions; dense only while it is multiplied."""

    shape: tuple[int, int]
    positions: Int[Tensor, " count"]
    values: Float[Tensor, " count"]
    dvalues: Float[Tensor, " count"] | None = None

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """In the precision of the activations."""
        flat = self.values.new_zeros(self.shape[0] * self.shape[1])
        flat[self.positions] = self.values
        return flat.view(self.shape)

    def forward_(self, out: Tensor, x: Tensor) -> Tensor | None:
        """`out += x D^T`."""
        out.addmm_(x, self.dense().T)
        return None

    def backward_(
        self, grad: Tensor, x: Tensor, middle: Tensor | None, dx: Tensor | None, beta: int
    ) -> None:
        """The entries of `g^T x` at the positions; `dx += g D`."""
        if self.dvalues is not None:
            self.dvalues.add_((grad.T @ x).flatten()[self.positions])
        if dx is not None:
            dx.addmm_(grad, self.dense(), beta=beta)


def frozen(term: FrozenTerm, dtype: torch.dtype, device: torch.device) -> Term:
    """A payload's frozen term, a product or dense, as one of these."""
    if isinstance(term, LowRank):
        d = term.to(dtype, device)
        return Lora(d.A, d.B, d.scaling)
    return Dense(term.to(device, dtype))


@dataclass(eq=False)
class Dense:
    """A dense frozen matrix."""

    D: Float[Tensor, "d_out d_in"]

    def forward_(self, out: Tensor, x: Tensor) -> Tensor | None:
        """`out += x D^T`."""
        out.addmm_(x, self.D.T)
        return None

    def backward_(
        self, grad: Tensor, x: Tensor, middle: Tensor | None, dx: Tensor | None, beta: int
    ) -> None:
        """`dx += g D`."""
        if dx is not None:
            dx.addmm_(grad, self.D, beta=beta)


Parts = Sequence[tuple[Term, int, int]]
"""`(term, start, end)`: the rows of the flattened tokens on which a term acts."""


class AddTerms(torch.autograd.Function):
    """`out[a:b] += term(x[a:b])` for each part, in place."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Float[Tensor, "*batch d_out"],
        x: Float[Tensor, "tokens d_in"],
        anchor: Tensor,
        parts: Parts,
    ) -> Tensor:
        """`anchor` asks for gradients, so that a backward is run where `x` asks for none."""
        rows = out.view(-1, out.shape[-1])
        middle = [term.forward_(rows[a:b], x[a:b]) for term, a, b in parts]
        ctx.save_for_backward(x, *middle)
        ctx.parts = parts
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """`out` passes its gradient on; terms keep theirs."""
        x, *middle = ctx.saved_tensors
        rows, dx, beta = grad.reshape(x.shape[0], -1), None, 0
        if ctx.needs_input_grad[1]:
            whole = _covers(ctx.parts, x.shape[0])
            dx, beta = (torch.empty_like(x), 0) if whole else (torch.zeros_like(x), 1)
        for (term, a, b), kept in zip(ctx.parts, middle, strict=True):
            term.backward_(rows[a:b], x[a:b], kept, None if dx is None else dx[a:b], beta)
        return grad, dx, None, None


def _covers(parts: Parts, tokens: int) -> bool:
    """Whether every row belongs to exactly one part."""
    ends = [0, *(b for _, _, b in parts)]
    return ends[-1] == tokens and all(a == end for (_, a, _), end in zip(parts, ends, strict=False))
