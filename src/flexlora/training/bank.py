"""Many adapters on one frozen base: one forward and backward trains a whole cohort.

The factors of `C` clients are stacked, per module, as `A (C, r_max, d_in)` and `B (C, d_out,
r_max)`, each client with its own rank and scaling. A forward hook on every target layer adds, to
the tokens of client `k`, the term `s_k (x A_k^T) B_k^T`; whatever the layer itself is
(`nn.Linear`, a 4-bit layer, GPT-2's `Conv1D`) stays untouched. Rows beyond a client's rank are
never read, so padding of rank is exact. The clients' losses are summed: no term depends on two
clients, so each client's gradient is what it would be alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from flexlora.adapter import Adapter
from flexlora.federation.state import Term
from flexlora.lowrank import LowRank
from flexlora.training.dropout import Dropout

Spans = Sequence[tuple[int, int, int]]
"""`(slot, start, end)`: which rows of the flattened tokens belong to which slot of the bank."""


class GroupedLora(torch.autograd.Function):
    """`y[a:b] = s_k (x[a:b] A_k^T) B_k^T` for each span `(k, a, b)`; tokens outside spans get 0.

    Written by hand because autograd over slices keeps a copy of `x` per client and module; this
    keeps `x`, which the layer below holds anyway, and the `(tokens, rank)` middle. Products are
    taken in the precision of `x`, gradients accumulated in that of the factors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "tokens d_in"],
        A: Float[Tensor, "slots rank d_in"],
        B: Float[Tensor, "slots d_out rank"],
        spans: Spans,
        ranks: Sequence[int],
        scaling: Sequence[float],
    ) -> Float[Tensor, "tokens d_out"]:
        """See the class."""
        y = x.new_zeros(x.shape[0], B.shape[1])
        middle = []
        for k, a, b in spans:
            h = x[a:b] @ A[k, : ranks[k]].to(x.dtype).T
            torch.mm(h * scaling[k], B[k, :, : ranks[k]].to(x.dtype).T, out=y[a:b])
            middle.append(h)
        ctx.save_for_backward(x, A, B, *middle)
        ctx.layout = spans, ranks, scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "tokens d_out"]) -> tuple[Tensor | None, ...]:
        """`dB_k = g^T h`, `dA_k = (g B_k)^T x`, `dx = g B_k A_k` with `g = s_k grad`."""
        x, A, B, *middle = ctx.saved_tensors
        spans, ranks, scaling = ctx.layout
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        dx = x.new_zeros(x.shape) if need_x else None
        dA = torch.zeros_like(A) if need_A else None
        dB = torch.zeros_like(B) if need_B else None
        for (k, a, b), h in zip(spans, middle, strict=True):
            r = ranks[k]
            g = grad[a:b] * scaling[k]
            if dB is not None:
                dB[k, :, :r] += g.T @ h
            if dA is None and dx is None:
                continue
            gB = g @ B[k, :, :r].to(x.dtype)
            if dA is not None:
                dA[k, :r] += gB.T @ x[a:b]
            if dx is not None:
                torch.mm(gB, A[k, :r].to(x.dtype), out=dx[a:b])
        return dx, dA, dB, None, None, None


@dataclass(frozen=True)
class Route:
    """The way of one batch through the slots; see :meth:`Bank.routed`."""

    slots: tuple[int, ...]
    sizes: tuple[int, ...]
    dropout: Dropout | None = None

    def spans(self, tokens: int) -> Spans:
        """`(slot, start, end)` over the flattened tokens of a layer's input."""
        unit, ends = tokens // sum(self.sizes), list(accumulate(self.sizes, initial=0))
        return [(k, ends[i] * unit, ends[i + 1] * unit) for i, k in enumerate(self.slots)]


@dataclass(eq=False)
class Stacked:
    """One module's factors for all slots, zero beyond each slot's rank."""

    A: Float[Tensor, "slots rank d_in"]
    B: Float[Tensor, "slots d_out rank"]
    ranks: list[int]
    scaling: list[float]


class Bank:
    """Slots for adapters on one frozen base model.

    A slot is loaded with an adapter, used by the tokens routed to it, and read back. Slots may be
    loaded again while others go on, which is how a client that finishes makes room for the next.

    Args:
        model: the frozen base.
        shapes: module path -> `(d_out, d_in)` of the target layers.
        max_ranks: module path -> largest rank any slot will hold.
        slots: how many adapters at once. Memory: `4 * slots * sum r (d_out + d_in)` bytes.
    """

    def __init__(
        self,
        model: nn.Module,
        shapes: Mapping[str, tuple[int, int]],
        max_ranks: Mapping[str, int],
        slots: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        device = next(model.parameters()).device
        self.model = model
        self.frozen: list[Mapping[str, tuple[Term, ...]]] = [{} for _ in range(slots)]
        self.stacks: dict[str, Stacked] = {}
        for module, r in max_ranks.items():
            d_out, d_in = shapes[module]
            A = torch.zeros(slots, r, d_in, dtype=dtype, device=device)
            B = torch.zeros(slots, d_out, r, dtype=dtype, device=device)
            self.stacks[module] = Stacked(A, B, [0] * slots, [1.0] * slots)

    @classmethod
    def holding(
        cls,
        model: nn.Module,
        adapters: Sequence[Adapter],
        frozen: Sequence[Mapping[str, tuple[Term, ...]]] | None = None,
    ) -> Bank:
        """A bank with one slot per adapter, loaded: for evaluation."""
        shapes = {m: d.shape for adapter in adapters for m, d in adapter.items()}
        shapes |= {m: _shape(t[0]) for terms in frozen or () for m, t in terms.items()}
        ranks = {m: max((a[m].rank for a in adapters if m in a), default=0) for m in shapes}
        bank = cls(model, shapes, ranks, len(adapters))
        for slot, adapter in enumerate(adapters):
            bank.load(slot, adapter, frozen[slot] if frozen else {})
        return bank

    @torch.no_grad()
    def load(
        self, slot: int, adapter: Adapter, frozen: Mapping[str, tuple[Term, ...]] | None = None
    ) -> None:
        """Put an adapter (and the frozen terms that go with it) into a slot, exactly.

        Raises:
            ValueError: a module the bank does not have.
        """
        unknown = sorted({*adapter, *(frozen or {})} - set(self.stacks))
        if unknown:
            raise ValueError(f"Bank.load: no such module: {unknown[:3]}; has {len(self.stacks)}.")
        self.frozen[slot] = {
            m: tuple(_on(self.stacks[m].A.device, t) for t in terms)
            for m, terms in (frozen or {}).items()
        }
        for module, stacked in self.stacks.items():
            stacked.A[slot].zero_()
            stacked.B[slot].zero_()
            stacked.ranks[slot] = 0
            if module in adapter:
                d = adapter[module]
                stacked.A[slot, : d.rank] = d.A
                stacked.B[slot, :, : d.rank] = d.B
                stacked.ranks[slot], stacked.scaling[slot] = d.rank, d.scaling

    def read(self, slot: int) -> dict[str, LowRank]:
        """A slot's adapter in memory of its own, at its own rank and scaling."""
        return {
            module: LowRank(s.B[slot, :, :r].detach().clone(), s.A[slot, :r].detach().clone(), c)
            for module, s in self.stacks.items()
            for r, c in [(s.ranks[slot], s.scaling[slot])]
            if r
        }

    def parameters(self, train: str = "AB") -> list[Tensor]:
        """The stacked factors that move: those of `train`, `A` before `B`, module by module."""
        return [getattr(s, x) for s in self.stacks.values() for x in train]

    @contextmanager
    def routed(
        self, slots: Sequence[int], sizes: Sequence[int], dropout: Dropout | None = None
    ) -> Iterator[None]:
        """While open, the model's tokens pass through the slots in this order.

        Args:
            slots: the slot of each run of inputs.
            sizes: length of each run, in the unit that stays the same from call to call: rows of a
                padded batch (generation), or tokens of a flat one.
            dropout: of the adapters' input, as LoRA has it; None for evaluation.
        """
        route = Route(tuple(slots), tuple(sizes), dropout)
        handles = [
            self.model.get_submodule(module).register_forward_hook(
                partial(self._add, module, route)
            )
            for module in self.stacks
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, module: str, route: Route, _: nn.Module, args: Any, out: Tensor) -> Tensor:
        """The hook: `W0 x` in, `W0 x + sum of terms` out."""
        x, stacked = args[0].reshape(-1, args[0].shape[-1]), self.stacks[module]
        spans = route.spans(x.shape[0])
        own = [span for span in spans if stacked.ranks[span[0]]]
        kept = route.dropout.apply(x, module) if route.dropout else x
        total: Tensor = GroupedLora.apply(  # type: ignore[no-untyped-call]
            kept, stacked.A, stacked.B, own, tuple(stacked.ranks), tuple(stacked.scaling)
        )
        for terms, start, end in self._frozen_spans(module, spans):
            for term in terms:
                added = apply_term(x[start:end], term)
                total = total + pad(added, (0, 0, start, x.shape[0] - end))
        return out + total.view(out.shape)

    def _frozen_spans(self, module: str, spans: Spans) -> list[tuple[tuple[Term, ...], int, int]]:
        """Frozen terms with the tokens they act on; neighbours with the same terms are joined."""
        joined: list[tuple[tuple[Term, ...], int, int]] = []
        for slot, start, end in spans:
            terms = self.frozen[slot].get(module, ())
            if (
                joined
                and len(joined[-1][0]) == len(terms)
                and all(a is b for a, b in zip(joined[-1][0], terms, strict=True))
            ):
                joined[-1] = (terms, joined[-1][1], end)
            else:
                joined.append((terms, start, end))
        return [j for j in joined if j[0]]


def _shape(term: Term) -> tuple[int, int]:
    return (int(term.shape[0]), int(term.shape[1]))


def _on(device: torch.device, term: Term) -> Term:
    """The term itself where it is there already, so that slots can share it."""
    here = term.A.device if isinstance(term, LowRank) else term.device
    return term if here == device else term.to(device=device)


def apply_term(x: Float[Tensor, "tokens d_in"], term: Term) -> Float[Tensor, "tokens d_out"]:
    """`x D^T` for a frozen `D`, a product or dense, in the precision of `x`."""
    if isinstance(term, LowRank):
        return (x @ term.A.to(x.dtype).T) @ (term.B * term.scaling).to(x.dtype).T
    return x @ term.to(x.dtype).T
