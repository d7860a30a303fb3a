"""Many adapters on one frozen base: one forward and backward trains a whole cohort.

A forward hook on every target layer adds, to the tokens of client `k`, the term
`s_k (x A_k^T) B_k^T`; whatever the layer itself is (`nn.Linear`, a 4-bit layer, GPT-2's `Conv1D`)
stays untouched. Each client has its own rank and scaling. The clients' losses are summed: no term
depends on two clients, so each client's gradient is what it would be alone.

Two ways lead to the same sums. On a CPU each client has a vector of exactly its own size, and a
module is a loop over clients. On a GPU launches cost more than padding: all slots are as wide as
the largest, and a module is three batched products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from flexlora.adapter import Adapter
from flexlora.federation.state import Factors
from flexlora.federation.state import Term as FrozenTerm
from flexlora.lowrank import LowRank, Mask
from flexlora.training import terms
from flexlora.training.dropout import Dropout
from flexlora.training.slot import Places, Slot, places, view
from flexlora.training.stacked import AddStacked, Grid, Stack
from flexlora.training.terms import AddTerms, Parts

PLAIN = ("torch.nn", "transformers")
"""Whose layers' outputs are written into; others' may be views of a Function of their own."""

Frozen = Mapping[str, tuple[FrozenTerm, ...]]
Spans = Sequence[tuple[int, int, int]]
"""`(slot, start, end)`: which rows of the flattened tokens belong to which slot of the bank."""


@dataclass(frozen=True, eq=False)
class Route:
    """The way of one batch through the slots; see :meth:`Bank.routed`."""

    slots: tuple[int, ...]
    sizes: tuple[int, ...]
    dropout: Dropout | None = None
    grids: dict[int, Grid] = field(default_factory=dict)

    def spans(self, tokens: int) -> Spans:
        """`(slot, start, end)` over the flattened tokens of a layer's input."""
        unit, ends = tokens // sum(self.sizes), list(accumulate(self.sizes, initial=0))
        return [(k, ends[i] * unit, ends[i + 1] * unit) for i, k in enumerate(self.slots)]

    def grid(self, tokens: int, device: torch.device) -> Grid:
        """The same as padded indices, made once for all modules."""
        if tokens not in self.grids:
            self.grids[tokens] = Grid.of(self.spans(tokens), device)
        return self.grids[tokens]


class Bank:
    """Slots for adapters on one frozen base model.

    A slot is loaded with an adapter, used by the tokens routed to it, and read back. Slots may be
    loaded again while others go on, which is how a client that finishes makes room for the next.

    Args:
        model: the frozen base.
        shapes: module path -> `(d_out, d_in)` of the target layers.
        slots: how many adapters at once.
        dtype: in which factors are kept and trained.
        activations: precision of the base's activations, in which products are taken.
        train: which factors get gradients.
        widest: module path -> the largest rank of any slot: stack the slots, see the module. None:
            a vector for each.
    """

    def __init__(
        self,
        model: nn.Module,
        shapes: Mapping[str, tuple[int, int]],
        slots: int,
        dtype: torch.dtype = torch.float32,
        activations: torch.dtype | None = None,
        train: Factors = "",
        widest: Mapping[str, int] | None = None,
    ) -> None:
        self.model, self.shapes, self.train = model, shapes, train
        self.dtype, self.activations = dtype, activations or dtype
        self.device = next(model.parameters()).device
        self.slots: list[Slot | None] = [None] * slots
        self.frozen: list[dict[str, tuple[terms.Term, ...]]] = [{} for _ in range(slots)]
        self._sources: list[Frozen] = [{} for _ in range(slots)]
        self.anchor = torch.zeros((), requires_grad=True)
        self._places: Places | None = None
        self.stacks: dict[str, Stack] = {}
        if widest is not None:
            self._stack(widest, slots)

    def _stack(self, widest: Mapping[str, int], slots: int) -> None:
        """All slots as rows of one matrix, so that a module's factors are a view."""
        sizes = {m: (self.shapes[m][0], r, self.shapes[m][1]) for m, r in widest.items()}
        self._places, numbers, trained = places(sizes, self.train)
        values = torch.zeros(slots, numbers, dtype=self.dtype, device=self.device)
        grad = values.new_zeros(slots, trained)
        low = values if self.activations == self.dtype else values.to(self.activations)
        for k in range(slots):
            row = values[k]
            self.slots[k] = Slot(row, row if low is values else low[k], grad[k])
        for module in widest:
            A, B = (view(low, self._places[module, f]) for f in "AB")
            dA, dB = (view(grad, self._places[module, f]) for f in "AB")
            assert A is not None
            assert B is not None
            scaling = torch.zeros(slots, 1, 1, device=self.device)
            self.stacks[module] = Stack(A, B, scaling, dA, dB)

    @classmethod
    def holding(
        cls,
        model: nn.Module,
        adapters: Sequence[Adapter],
        frozen: Sequence[Frozen] | None = None,
        train: Factors = "",
        stacked: bool | None = None,
    ) -> Bank:
        """A bank with one slot per adapter, loaded. Default: stacked on a GPU."""
        parameters = next(p for p in model.parameters() if p.is_floating_point())
        shapes = {m: d.shape for adapter in adapters for m, d in adapter.items()}
        shapes |= {m: _shape(t[0]) for own in frozen or () for m, t in own.items()}
        dtype = torch.promote_types(parameters.dtype, torch.float32)
        widest = None
        if stacked if stacked is not None else parameters.device.type == "cuda":
            widest = {m: max((a[m].rank for a in adapters if m in a), default=1) for m in shapes}
        bank = cls(model, shapes, len(adapters), dtype, parameters.dtype, train, widest)
        for slot, adapter in enumerate(adapters):
            bank.load(slot, adapter, frozen[slot] if frozen else None)
        return bank

    @torch.no_grad()
    def load(
        self,
        slot: int,
        adapter: Adapter,
        frozen: Frozen | None = None,
        masks: Mapping[str, Mask] | None = None,
    ) -> Slot:
        """Put an adapter (and the frozen terms that go with it) into a slot, exactly.

        Raises:
            ValueError: a module the bank does not have.
        """
        frozen, masks = frozen or {}, masks or {}
        unknown = sorted({*adapter, *frozen} - set(self.shapes))
        if unknown:
            raise ValueError(f"Bank.load: no such module: {unknown[:3]}; has {len(self.shapes)}.")
        self.frozen[slot] = {
            m: tuple(self._made(m, t) for t in given) for m, given in frozen.items()
        }
        self._sources[slot] = frozen
        at, place = self._places, self.slots[slot]
        if at is None or place is None:
            sizes = {m: _size(d, m in masks) for m, d in adapter.items()}
            at, numbers, trained = places(sizes, self.train)
            values = torch.empty(numbers, dtype=self.dtype, device=self.device)
            low = values if self.activations == self.dtype else values.to(self.activations)
            place = Slot(values, low, values.new_empty(trained))
        place.fill_(adapter, at, masks)
        self.slots[slot] = place
        for module, stack in self.stacks.items():
            stack.scaling[slot] = adapter[module].scaling if module in adapter else 0.0
        return place

    def _made(self, module: str, term: FrozenTerm) -> terms.Term:
        """A frozen term on the bank's device; one that another slot holds already is shared."""
        for sources, made in zip(self._sources, self.frozen, strict=True):
            for source, own in zip(sources.get(module, ()), made.get(module, ()), strict=True):
                if source is term:
                    return own
        return terms.frozen(term, self.activations, self.device)

    def read(self, slot: int) -> dict[str, LowRank]:
        """A slot's adapter in memory of its own, at its own rank and scaling."""
        return {
            m: LowRank(d.B.detach().clone(), d.A.detach().clone(), d.scaling)
            for m, d in self.held(slot).adapter.items()
        }

    def held(self, slot: int) -> Slot:
        """A slot that has been loaded.

        Raises:
            ValueError: it has not.
        """
        found = self.slots[slot]
        if found is None:
            raise ValueError(f"Bank: slot {slot} is empty; load an adapter first.")
        return found

    @contextmanager
    def routed(
        self, slots: Sequence[int], sizes: Sequence[int], dropout: Dropout | None = None
    ) -> Iterator[None]:
        """While open, the model's tokens pass through the slots in this order.

        With gradient checkpointing the backward belongs inside too: it repeats the forward.

        Args:
            slots: the slot of each run of inputs.
            sizes: length of each run, in the unit that stays the same from call to call: rows of a
                padded batch (generation), or tokens of a flat one.
            dropout: of the adapters' input, as LoRA has it; None for evaluation.
        """
        route = Route(tuple(slots), tuple(sizes), dropout)
        touched = {m for k in slots for m in (*self.held(k).terms, *self.frozen[k])}
        handles = [
            self.model.get_submodule(m).register_forward_hook(partial(self._add, m, route))
            for m in sorted(touched)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, module: str, route: Route, layer: nn.Module, args: Any, out: Tensor) -> Tensor:
        """The hook: `W0 x` in, `W0 x + sum of terms` out."""
        if not type(layer).__module__.startswith(PLAIN):
            out = out.clone()
        x = args[0].reshape(-1, args[0].shape[-1])
        spans = route.spans(x.shape[0])
        kept = route.dropout.apply(x, module) if route.dropout else x
        if module in self.stacks:
            grid = route.grid(x.shape[0], x.device)
            out = AddStacked.apply(  # type: ignore[no-untyped-call]
                out, kept, self.anchor, self.stacks[module], grid
            )
        else:
            own = [(self.held(k).terms.get(module), a, b) for k, a, b in spans]
            parts = [(term, a, b) for term, a, b in own if term is not None]
            if parts:
                out = AddTerms.apply(out, kept, self.anchor, parts)  # type: ignore[no-untyped-call]
        frozen = self._frozen_parts(module, spans)
        if frozen:
            out = AddTerms.apply(out, x, self.anchor, frozen)  # type: ignore[no-untyped-call]
        return out

    def _frozen_parts(self, module: str, spans: Spans) -> Parts:
        """Frozen terms with the tokens they act on; neighbours that share one are joined."""
        parts: list[tuple[terms.Term, int, int]] = []
        for slot, start, end in spans:
            for term in self.frozen[slot].get(module, ()):
                joined = [i for i, p in enumerate(parts) if p[0] is term and p[2] == start]
                if joined:
                    parts[joined[0]] = (term, parts[joined[0]][1], end)
                else:
                    parts.append((term, start, end))
        return parts


def _shape(term: FrozenTerm) -> tuple[int, int]:
    return (int(term.shape[0]), int(term.shape[1]))


def _size(d: LowRank, sparse: bool) -> tuple[int, int, int]:
    """`(d_out, rank, d_in)` of what a slot holds; of a sparse term, its values only."""
    return (d.B.shape[0], d.rank, 0 if sparse else d.A.shape[1])
