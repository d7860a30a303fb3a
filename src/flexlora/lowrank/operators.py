"""Matrices that are applied: a weighted sum of products that is never formed, and a dense one.

Every tensor here has a leading module dimension: modules of equal shape are worked on together, as
batched matrix products; a single module is a batch of one (views, no copies).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.lowrank.product import LowRank

MERGE_RANK = 128
"""Small terms are concatenated to about this many rows: matrix products with fewer run slowly."""

PLAIN = 2.0**40
"""Factors whose largest entry lies within `[1 / PLAIN, PLAIN]` are used as they are."""


class Operator(Protocol):
    """What the iterative factorisations need of a batch of matrices."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(modules, d_out, d_in)`."""

    def apply(self, X: Float[Tensor, "modules d_in k"]) -> Float[Tensor, "modules d_out k"]:
        """`D X`."""

    def apply_t(self, Y: Float[Tensor, "modules d_out k"]) -> Float[Tensor, "modules d_in k"]:
        """`D^T Y`."""


@dataclass(frozen=True)
class DenseMatrix:
    """A batch of matrices in memory."""

    D: Float[Tensor, "modules d_out d_in"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(modules, d_out, d_in)`."""
        return self.D.shape[0], self.D.shape[1], self.D.shape[2]

    def apply(self, X: Float[Tensor, "modules d_in k"]) -> Float[Tensor, "modules d_out k"]:
        """`D X`."""
        return self.D @ X

    def apply_t(self, Y: Float[Tensor, "modules d_out k"]) -> Float[Tensor, "modules d_in k"]:
        """`D^T Y`."""
        return self.D.mT @ Y


class Block(NamedTuple):
    """Some terms of a sum, concatenated: `B diag(f) A`."""

    B: Float[Tensor, "modules d_out rank"]
    A: Float[Tensor, "modules rank d_in"]
    f: Float[Tensor, "modules rank 1"]


@dataclass(frozen=True)
class Sum:
    """`sum_k w_k s_k B_k A_k / scale` per module, applied in `2 R (d_out + d_in)` FLOPs a column.

    The division by `scale`, a power of two near the largest term, keeps squares and products within
    range for updates of any size; powers of two round nothing. Factors that already have the right
    dtype are used where they lie; others are cast block by block on every pass, except for the
    first `cache_bytes` of them, so that memory does not grow with the cohort.

    Attributes:
        modules: per module its terms; the k-th terms of all modules have one rank.
        f: `(modules, terms)` coefficients after scaling.
        shrink: `(modules, terms, 2)` powers of two that `B` and `A` are divided by when loaded.
        scale: per module.
        dtype: of the arithmetic.
        device: of the arithmetic.
        kept: blocks held ready.
        groups: which terms form a block.
    """

    modules: Sequence[Sequence[LowRank]]
    f: Float[Tensor, "modules terms"]
    shrink: Float[Tensor, "modules terms 2"]
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
        """The terms, block by block, in their order."""
        for i, group in enumerate(self.groups):
            yield self.kept[i] if i in self.kept else self._load(group)

    def apply(self, X: Float[Tensor, "modules d_in k"]) -> Float[Tensor, "modules d_out k"]:
        """`D X = sum_k B_k (f_k (A_k X))`."""
        out = X.new_zeros(X.shape[0], self.shape[1], X.shape[2])
        for B, A, f in self.blocks():
            out.baddbmm_(B, f * (A @ X))
        return out

    def apply_t(self, Y: Float[Tensor, "modules d_out k"]) -> Float[Tensor, "modules d_in k"]:
        """`D^T Y = sum_k A_k^T (f_k (B_k^T Y))`."""
        out = Y.new_zeros(Y.shape[0], self.shape[2], Y.shape[2])
        for B, A, f in self.blocks():
            out.baddbmm_(A.mT, f * (B.mT @ Y))
        return out

    def dense(self) -> DenseMatrix:
        """The sum, formed: `2 d_out d_in R` FLOPs."""
        out = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for B, A, f in self.blocks():
            out.baddbmm_(B * f.mT, A)
        return DenseMatrix(out)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All terms side by side, `(modules, d_out, R)` and `(modules, R, d_in)`."""
        parts = [(B * f.mT, A) for B, A, f in self.blocks()]
        return torch.cat([b for b, _ in parts], 2), torch.cat([a for _, a in parts], 1)

    def _load(self, group: tuple[int, ...]) -> Block:
        parts = [self._term(k) for k in group]
        if len(parts) == 1:
            return parts[0]
        B, A, f = zip(*parts, strict=True)
        return Block(torch.cat(B, 2), torch.cat(A, 1), torch.cat(f, 1))

    def _term(self, k: int) -> Block:
        terms = [module[k] for module in self.modules]
        B = self._batch([t.B for t in terms], self.shrink[:, k, 0])
        A = self._batch([t.A for t in terms], self.shrink[:, k, 1])
        return Block(B, A, self.f[:, k, None, None].expand(-1, terms[0].rank, 1))

    def _batch(self, factors: list[Tensor], shrink: Tensor) -> Tensor:
        x = factors[0][None] if len(factors) == 1 else torch.stack(factors)
        x = x.to(device=self.device, dtype=self.dtype)
        return x if bool((shrink == 1).all()) else x / shrink.to(x)[:, None, None]


def weighted_sum(
    modules: Sequence[Sequence[LowRank]],
    weights: Sequence[float],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    cache_bytes: int = 0,
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
    peaks = torch.stack([torch.stack([_peaks(t) for t in terms]) for terms in modules]).cpu()
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
    bare = Sum(modules, f, shrink, scale, dtype, device, _groups(first), {})
    return _keep(bare, cache_bytes)


def _widest(terms: Sequence[LowRank]) -> torch.dtype:
    dtype = torch.float32
    for t in terms:
        dtype = torch.promote_types(dtype, torch.promote_types(t.B.dtype, t.A.dtype))
    return dtype


def _peaks(term: LowRank) -> Tensor:
    ends = [e.double().abs() for x in (term.B, term.A) for e in torch.aminmax(x)]
    peak_b, peak_a = torch.maximum(ends[0], ends[1]), torch.maximum(ends[2], ends[3])
    return torch.stack([peak_b, peak_a])


def _groups(terms: Sequence[LowRank]) -> tuple[tuple[int, ...], ...]:
    """Neighbouring terms together until they hold `MERGE_RANK` rows; larger ones stay alone."""
    groups: list[tuple[int, ...]] = []
    waiting: list[int] = []
    for k, term in enumerate(terms):
        if term.rank >= MERGE_RANK // 2:
            groups.append((k,))
            continue
        waiting.append(k)
        if sum(terms[j].rank for j in waiting) >= MERGE_RANK:
            groups.append(tuple(waiting))
            waiting = []
    return (*groups, tuple(waiting)) if waiting else tuple(groups)


def _keep(total: Sum, cache_bytes: int) -> Sum:
    """Load blocks that are copies, until `cache_bytes` of them are held."""
    kept, held = {}, 0
    _, d_out, d_in = total.shape
    for i, group in enumerate(total.groups):
        terms = [m[k] for m in total.modules for k in group]
        here = len(terms) == 1 and all(
            x.dtype == total.dtype and x.device == total.device for x in (terms[0].B, terms[0].A)
        )
        if here and bool((total.shrink[:, group] == 1).all()):
            continue
        size = sum(t.rank for t in terms) * (d_out + d_in) * total.dtype.itemsize
        if held + size > cache_bytes:
            break
        kept[i], held = total._load(group), held + size
    return Sum(**{**total.__dict__, "kept": kept})


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
