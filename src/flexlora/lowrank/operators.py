"""Matrices that are applied: a weighted sum of products that is never formed, and a dense one.

Every tensor here has a leading module dimension: modules of equal shape are worked on together, as
batched matrix products; a single module is a batch of one (views, no copies). Vectors are rows: a
few long rows times a matrix run up to a third faster than the same as columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.lowrank.product import LowRank

MERGE_RANK = 128
"""Small terms are concatenated to about this many rows: matrix products with fewer run slowly."""

PLAIN = 2.0**40
"""Factors whose largest entry lies within `[1 / PLAIN, PLAIN]` are used as they are."""


class Operator(Protocol):
    """What the iterative factorisations need of a batch of matrices.

    Attributes:
        power_steps: of `D^T D` on a random start, before the subspaces grow: they make those
            narrower. On a noisy spectrum they cost no products, on a steep one a few: more of them
            where products are cheap.
    """

    power_steps: ClassVar[int]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(modules, d_out, d_in)`."""

    def apply(self, X: Float[Tensor, "modules k d_in"]) -> Float[Tensor, "modules k d_out"]:
        """`X D^T`: `D` times each row."""

    def apply_t(self, Y: Float[Tensor, "modules k d_out"]) -> Float[Tensor, "modules k d_in"]:
        """`Y D`: `D^T` times each row."""


@dataclass(frozen=True)
class DenseMatrix:
    """A batch of matrices in memory."""

    power_steps: ClassVar[int] = 2
    D: Float[Tensor, "modules d_out d_in"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(modules, d_out, d_in)`."""
        return self.D.shape[0], self.D.shape[1], self.D.shape[2]

    def apply(self, X: Float[Tensor, "modules k d_in"]) -> Float[Tensor, "modules k d_out"]:
        """`X D^T`: `D` times each row."""
        return X @ self.D.mT

    def apply_t(self, Y: Float[Tensor, "modules k d_out"]) -> Float[Tensor, "modules k d_in"]:
        """`Y D`: `D^T` times each row."""
        return Y @ self.D


class Block(NamedTuple):
    """Some terms of a sum, concatenated: `B diag(f) A`; one number where one term stands alone."""

    B: Float[Tensor, "modules d_out rank"]
    A: Float[Tensor, "modules rank d_in"]
    f: Float[Tensor, "modules 1 rank"] | float


Room = tuple[Tensor, Tensor]
"""Memory for the `B` and `A` of a block."""


@dataclass(frozen=True)
class Sum:
    """`sum_k w_k s_k B_k A_k / scale` per module, applied in `2 R (d_out + d_in)` FLOPs a row.

    The division by `scale`, a power of two near the largest term, keeps squares and products within
    range for updates of any size; powers of two round nothing. Factors that already have the right
    dtype are used where they lie; others are cast block by block on every pass, except for those
    that are kept, so that memory does not grow with the cohort.

    Attributes:
        modules: per module its terms; the k-th terms of all modules have one rank.
        f: `(modules, terms)` coefficients after scaling.
        shrink: per module and term, powers of two that `B` and `A` are divided by when loaded.
        scale: per module.
        dtype: of the arithmetic.
        device: of the arithmetic.
        kept: blocks held ready.
        groups: which terms form a block.
    """

    power_steps: ClassVar[int] = 1
    modules: Sequence[Sequence[LowRank]]
    f: Float[Tensor, "modules terms"]
    shrink: Sequence[Sequence[tuple[float, float]]]
    scale: Float[Tensor, " modules"]
    dtype: torch.dtype
    device: torch.device
    groups: tuple[tuple[int, ...], ...]
    kept: dict[int, Block]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(modules, d_out, d_in)`."""
        return len(self.modules), *self.modules[0][0].shape

    @property
    def rank(self) -> int:
        """`R = sum r_k`."""
        return sum(t.rank for t in self.modules[0])

    @property
    def like(self) -> Tensor:
        """An empty tensor of the arithmetic's dtype, on its device."""
        return self.f.new_empty(0)

    def blocks(self) -> Iterator[Block]:
        """The terms, block by block, in their order; a block holds until the next one is asked for.

        Casts go to one buffer for the whole pass: fresh memory for each would cost more than they.
        """
        room: Room | None = None
        for i, group in enumerate(self.groups):
            if i in self.kept:
                yield self.kept[i]
            elif self.in_place(group):
                term = self.modules[0][group[0]]
                yield Block(term.B[None], term.A[None], self.f[0, group[0]].item())
            else:
                room = room or self.room(max(map(self.ranks, self.groups)))
                yield self.load(group, room)

    def apply(self, X: Float[Tensor, "modules k d_in"]) -> Float[Tensor, "modules k d_out"]:
        """`X D^T = sum_k (X A_k^T) f_k B_k^T`."""
        out = X.new_zeros(*X.shape[:2], self.shape[1])
        for B, A, f in self.blocks():
            _add(out, X @ A.mT, B.mT, f)
        return out

    def apply_t(self, Y: Float[Tensor, "modules k d_out"]) -> Float[Tensor, "modules k d_in"]:
        """`Y D = sum_k (Y B_k) f_k A_k`."""
        out = Y.new_zeros(*Y.shape[:2], self.shape[2])
        for B, A, f in self.blocks():
            _add(out, Y @ B, A, f)
        return out

    def dense(self) -> DenseMatrix:
        """The sum, formed: `2 d_out d_in R` FLOPs."""
        out = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        self.add_to_(out)
        return DenseMatrix(out)

    def add_to_(self, out: Float[Tensor, "modules d_out d_in"]) -> None:
        """`out += D`, in place."""
        for B, A, f in self.blocks():
            _add(out, B, A, f)

    def part(self, rows: slice) -> Sum:
        """Of those rows of each `A` and columns of each `B` only; without terms that have none."""
        having = [k for k, t in enumerate(self.modules[0]) if t.rank > (rows.start or 0)]
        modules = [
            [LowRank(m[k].B[:, rows], m[k].A[rows], m[k].scaling) for k in having]
            for m in self.modules
        ]
        return replace(
            self,
            modules=modules,
            f=self.f[:, having],
            shrink=[[s[k] for k in having] for s in self.shrink],
            groups=_groups(modules[0]),
            kept={},
        )

    def merged(self, rows: int) -> Sum:
        """The same, with neighbouring terms concatenated to about `rows` rows."""
        return replace(self, groups=_groups(self.modules[0], rows, alone=rows), kept={})

    def keeping(self, cache_bytes: int) -> Sum:
        """The same, with blocks that are copies loaded until `cache_bytes` of them are held."""
        kept, held = {}, 0
        count, d_out, d_in = self.shape
        for i, group in enumerate(self.groups):
            if not self.in_place(group):
                rank = self.ranks(group)
                held += count * rank * (d_out + d_in) * self.dtype.itemsize
                if held > cache_bytes:
                    break
                kept[i] = self.load(group, self.room(rank))
        return replace(self, kept=kept)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All terms side by side, `(modules, d_out, R)` and `(modules, R, d_in)`."""
        B, A, f = self.load(range(len(self.modules[0])), self.room(self.rank))
        return B * f, A

    def ranks(self, group: Sequence[int]) -> int:
        """Sum of ranks of some terms."""
        return sum(self.modules[0][k].rank for k in group)

    def in_place(self, group: Sequence[int]) -> bool:
        """Whether a block can be used where it lies."""
        if len(group) > 1 or len(self.modules) > 1:
            return False
        term = self.modules[0][group[0]]
        return self.shrink[0][group[0]] == (1.0, 1.0) and all(
            x.dtype == self.dtype and x.device == self.device for x in (term.B, term.A)
        )

    def room(self, rank: int) -> Room:
        """Uninitialised memory for a block."""
        count, d_out, d_in = self.shape
        return self.f.new_empty(count, d_out, rank), self.f.new_empty(count, rank, d_in)

    def load(self, group: Sequence[int], room: Room) -> Block:
        """Cast and concatenate some terms into `room`."""
        B, A = room
        at = 0
        for k in group:
            here = slice(at, at + self.modules[0][k].rank)
            for i, module in enumerate(self.modules):
                for to, x, size in zip(
                    (B[i, :, here], A[i, here]),
                    (module[k].B, module[k].A),
                    self.shrink[i][k],
                    strict=True,
                ):
                    to.copy_(x) if size == 1.0 else torch.div(x.to(to), size, out=to)
            at = here.stop
        counts = torch.tensor([self.modules[0][k].rank for k in group], device=self.device)
        f = self.f[:, list(group)].repeat_interleave(counts, 1)[:, None]
        return Block(B[..., :at], A[:, :at], f)


def _add(out: Tensor, x: Tensor, y: Tensor, f: Tensor | float) -> None:
    """`out += x diag(f) y`."""
    if isinstance(f, float):
        out.baddbmm_(x, y, alpha=f)
    else:
        out.baddbmm_(x * f, y)


def weighted_sum(
    modules: Sequence[Sequence[LowRank]],
    weights: Sequence[float],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Sum:
    """The :class:`Sum` of each module's terms. Reads every factor once, for its largest entry.

    Raises:
        ValueError: no terms, unequal shapes, as many weights as terms not given, or numbers that
            are not finite; says which term.
    """
    _check(modules, weights)
    first = modules[0]
    dtype = dtype or _widest(first)
    device = device or first[0].B.device
    peaks = torch.stack([_peaks(terms) for terms in modules])
    if not bool(peaks.isfinite().all()):
        module, term = (~peaks.isfinite()).any(2).nonzero()[0].tolist()
        raise ValueError(
            f"sum of products: term {term} of module {module} (of this call) holds NaN or infinite "
            "numbers; updates must be finite. Refuse it before it is averaged."
        )
    power = torch.where(peaks > 0, torch.exp2(peaks.clamp_min(5e-324).log2().floor()), 1.0)
    shrink = torch.where((power > PLAIN) | (power < 1 / PLAIN), power, 1.0)
    scaled = [[x * t.scaling for x, t in zip(weights, m, strict=True)] for m in modules]
    w = torch.tensor(scaled, dtype=torch.float64)
    size = w.abs() * peaks.prod(2)
    top = size.amax(1)
    scale = torch.where(top > 0, torch.exp2(top.clamp_min(5e-324).log2().floor()), 0.0)
    f = w * shrink.prod(2) / torch.where(scale > 0, scale, 1.0)[:, None]
    f = f.to(device=device, dtype=dtype)
    divisors = [[(b, a) for b, a in terms] for terms in shrink.tolist()]
    return Sum(modules, f, divisors, scale, dtype, device, _groups(first), {})


def _widest(terms: Sequence[LowRank]) -> torch.dtype:
    dtype = torch.float32
    for t in terms:
        dtype = torch.promote_types(dtype, torch.promote_types(t.B.dtype, t.A.dtype))
    return dtype


def _peaks(terms: Sequence[LowRank]) -> Float[Tensor, "terms 2"]:
    """Largest magnitude of every `B` and `A`, float64, on the CPU; NaN where there is one."""
    factors = (x if x.is_contiguous() else x.mT for t in terms for x in (t.B, t.A))
    ends = torch.stack([e for x in factors for e in torch.aminmax(x)])  # copies what is strided
    return ends.cpu().double().abs().view(len(terms), 2, 2).amax(2)


def _groups(
    terms: Sequence[LowRank], rows: int = MERGE_RANK, alone: int = MERGE_RANK // 2
) -> tuple[tuple[int, ...], ...]:
    """Neighbouring terms together until they hold `rows` rows; of `alone` rows, on their own."""
    groups: list[tuple[int, ...]] = []
    waiting: list[int] = []
    for k, term in enumerate(terms):
        if term.rank >= alone:
            groups.append((k,))
            continue
        waiting.append(k)
        if sum(terms[j].rank for j in waiting) >= rows:
            groups.append(tuple(waiting))
            waiting = []
    return (*groups, tuple(waiting)) if waiting else tuple(groups)


def _check(modules: Sequence[Sequence[LowRank]], weights: Sequence[float]) -> None:
    if not modules or not modules[0]:
        raise ValueError("sum of products: no terms; a sum over nobody has no shape.")
    if any(len(m) != len(weights) for m in modules):
        raise ValueError(
            f"sum of products: {len(weights)} weights for {[len(m) for m in modules][:3]} terms; "
            "expected one weight per term."
        )
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"sum of products: weights must be finite, got {list(weights)}.")
    shapes = {t.shape for m in modules for t in m}
    if len(shapes) > 1:
        raise ValueError(
            f"sum of products: terms must have one shape (d_out, d_in), got {sorted(shapes)}."
        )
    ranks = [[t.rank for t in m] for m in modules]
    if any(r != ranks[0] for r in ranks):
        raise ValueError("sum of products: modules worked on together must have equal ranks.")
