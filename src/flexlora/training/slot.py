"""One client's place in the bank: its factors end to end in one vector, gradients in another.

An optimiser step, a norm, a cast to the precision of the activations are then one operation for a
whole adapter. What is trained stands first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.adapter import Adapter
from flexlora.federation.state import Factors
from flexlora.lowrank import LowRank, Mask
from flexlora.training.terms import Lora, Sparse

Places = Mapping[tuple[str, str], tuple[int, tuple[int, ...]]]
"""`(module, factor)` -> offset and shape in a slot's vector."""


def places(shapes: Mapping[str, tuple[int, int, int]], train: Factors) -> tuple[Places, int, int]:
    """A slot's layout, with the numbers in all and how many of them, the first, are trained.

    Args:
        shapes: module -> `(d_out, rank, d_in)`; a sparse term has rank 1 and `d_in` 0.
        train: which factors move.

    >>> places({"q": (4, 2, 3)}, "B")[0]
    {('q', 'B'): (0, (4, 2)), ('q', 'A'): (8, (2, 3))}
    """
    found: dict[tuple[str, str], tuple[int, tuple[int, ...]]] = {}
    at = trained = 0
    for moving in (True, False):
        for module, (d_out, rank, d_in) in shapes.items():
            for factor, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
                if (factor in train) == moving:
                    found[module, factor] = at, shape
                    at += shape[0] * shape[1]
        trained = at if moving else trained
    return found, at, trained


@dataclass(eq=False)
class Slot:
    """A client's numbers and what they mean.

    Attributes:
        values: all factors, in the precision they are trained in.
        low: the same in the precision of the activations; the same tensor if that is the same.
        grad: of the first of them, those that are trained.
        terms: module -> what is added to its output; views of `low` and `grad`.
        adapter: module -> views of `values`, at the client's own rank and scaling.
    """

    values: Float[Tensor, " numbers"]
    low: Float[Tensor, " numbers"]
    grad: Float[Tensor, " trained"]
    terms: dict[str, Lora | Sparse] = field(default_factory=dict)
    adapter: dict[str, LowRank] = field(default_factory=dict)

    @property
    def trained(self) -> Float[Tensor, " trained"]:
        """The numbers that the optimiser moves."""
        return self.values[: self.grad.numel()]

    @torch.no_grad()
    def fill_(self, adapter: Adapter, at: Places, masks: Mapping[str, Mask]) -> None:
        """Put an adapter in, exactly; the places may be wider than its ranks and are zero there."""
        for x in (self.values, self.grad):
            x.zero_()
        self.terms, self.adapter = {}, {}
        for module, d in adapter.items():
            if module in masks:
                self._fill_sparse(module, d, at[module, "B"][0], masks[module])
                continue
            A, B = self._factors(self.values, at, module, d.rank)
            A.copy_(d.A)
            B.copy_(d.B)
            self.adapter[module] = LowRank(B, A, d.scaling)
            low = self._factors(self.low, at, module, d.rank)
            gradients = self._factors(self.grad, at, module, d.rank)
            self.terms[module] = Lora(*low, d.scaling, *gradients)
        self.refresh()

    def _fill_sparse(self, module: str, d: LowRank, start: int, mask: Mask) -> None:
        part = slice(start, start + mask.count)
        self.values[part] = d.B[:, 0]
        device = self.values.device
        one = torch.ones(1, 1, dtype=self.values.dtype, device=device)
        self.adapter[module] = LowRank(self.values[part][:, None], one, d.scaling)
        positions = mask.positions().to(device)
        self.terms[module] = Sparse(mask.shape, positions, self.low[part], self.grad[part])

    @staticmethod
    def _factors(x: Tensor, at: Places, module: str, rank: int) -> tuple[Any, Any]:
        """`A` and `B` in a vector, at the client's rank; None where they are not trained."""
        A, B = view(x, at[module, "A"]), view(x, at[module, "B"])
        return A if A is None else A[:rank], B if B is None else B[:, :rank]

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring `low` up to date after `values` moved."""
        if self.low is not self.values:
            self.low.copy_(self.values)


def view(x: Tensor, place: tuple[int, tuple[int, ...]]) -> Tensor | None:
    """One factor in a slot's vector, or in rows of them; None where they end before it."""
    start, shape = place
    end = start + shape[0] * shape[1]
    return None if end > x.shape[-1] else x[..., start:end].view(*x.shape[:-1], *shape)
