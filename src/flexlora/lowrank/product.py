"""Matrices kept as products: the values and the arithmetic every method is built from.

A LoRA update is `D = scaling * B @ A` with `B (d_out, r)` and `A (r, d_in)`. Two words are never
mixed up here: the *factors* `(B, A)` depend on the gauge (`B Q, Q^-1 A` is the same update), the
*product* is what the model sees. Nothing in this file forms a `(d_out, d_in)` matrix unless the
caller asks for it with :meth:`LowRank.dense`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Split = Literal["B", "balanced", "A"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """One matrix `scaling * B @ A`, never dense unless asked.

    Attributes:
        B: left factor, `(d_out, rank)`; zero at PEFT's initialisation.
        A: right factor, `(rank, d_in)`; PEFT's `lora_A`.
        scaling: the number the product is multiplied with, `alpha / rank` for standard LoRA.

    >>> import torch
    >>> d = LowRank(torch.ones(3, 1), torch.ones(1, 2), scaling=0.5)
    >>> d.shape, d.rank, d.dense()[0, 0].item()
    ((3, 2), 1, 0.5)
    """

    B: Float[Tensor, "d_out rank"]
    A: Float[Tensor, "rank d_in"]
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Number of components held; the numerical rank may be lower."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)` of the matrix that the product stands for."""
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix itself, `d_out * d_in` numbers: for small modules, merging and tests."""
        return self.scaling * (self.B @ self.A)

    def prefix(self, rank: int) -> LowRank:
        """The first `rank` components, as views. The best rank-`rank` matrix if in SVD order."""
        return LowRank(self.B[:, :rank], self.A[:rank], self.scaling)

    def suffix(self, rank: int) -> LowRank:
        """What :meth:`prefix` leaves out: components from `rank` on, as views."""
        return LowRank(self.B[:, rank:], self.A[rank:], self.scaling)

    def rescaled(self, scaling: float) -> LowRank:
        """The same matrix written with another scaling; the change is folded into `B`.

        >>> import torch
        >>> d = LowRank(torch.ones(2, 1), torch.ones(1, 2), scaling=4.0).rescaled(2.0)
        >>> d.scaling, d.B[0, 0].item(), d.dense()[0, 0].item()
        (2.0, 2.0, 4.0)
        """
        if scaling == self.scaling:
            return self
        return LowRank(self.B * (self.scaling / scaling), self.A, scaling)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LowRank:
        """Both factors in another dtype or on another device."""
        return LowRank(
            self.B.to(device=device, dtype=dtype),
            self.A.to(device=device, dtype=dtype),
            self.scaling,
        )

    def clone(self) -> LowRank:
        """Own memory, contiguous: a prefix that must outlive the factorisation it views."""
        return LowRank(self.B.contiguous().clone(), self.A.contiguous().clone(), self.scaling)


def stack(terms: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """Weighted sum of products as one product of rank `sum r_k`, exact and without a dense matrix.

    `sum_k w_k s_k B_k A_k = [w_1 s_1 B_1, ..., w_K s_K B_K] @ [A_1; ...; A_K]`: the weights and
    scalings go into `B`, the result has scaling 1. Cost: one copy of the factors, at least float32.

    Raises:
        ValueError: no terms, or terms of unequal shapes.

    >>> import torch
    >>> x, y = (LowRank(torch.ones(2, r), torch.ones(r, 3), 2.0) for r in (1, 4))
    >>> total = stack([x, y], [0.5, 0.5])
    >>> total.rank, total.dense()[0, 0].item()
    (5, 5.0)
    """
    if not terms:
        raise ValueError("stack: no terms; a sum over nobody has no shape. Expected at least one.")
    shapes = {t.shape for t in terms}
    if len(shapes) > 1:
        raise ValueError(f"stack: terms must have one shape (d_out, d_in), got {sorted(shapes)}.")
    weights = [1.0] * len(terms) if weights is None else list(weights)
    dtype = torch.promote_types(terms[0].B.dtype, torch.float32)
    B = torch.cat([t.B.to(dtype) * (w * t.scaling) for t, w in zip(terms, weights, strict=True)], 1)
    A = torch.cat([t.A.to(dtype) for t in terms], 0)
    return LowRank(B, A)


def difference(x: LowRank, y: LowRank) -> LowRank:
    """`x - y` at one rank and scaling, without cancellation: exactly zero if they are equal.

    `s (B_x A_x - B_y A_y) = s [B_x - B_y, B_y] @ [A_x; A_x - A_y]`, of twice the rank.

    Raises:
        ValueError: unequal shapes, ranks or scalings.

    >>> import torch
    >>> x = LowRank(torch.ones(2, 1), torch.ones(1, 3), 0.5)
    >>> norm(difference(x, x))
    0.0
    """
    if (x.shape, x.rank, x.scaling) != (y.shape, y.rank, y.scaling):
        raise ValueError(
            f"difference: {x.shape} at rank {x.rank}, scaling {x.scaling} less {y.shape} at rank "
            f"{y.rank}, scaling {y.scaling}; expected the same of both. Use stack for others."
        )
    return LowRank(torch.cat([x.B - y.B, y.B], 1), torch.cat([x.A, x.A - y.A]), x.scaling)


def merge(patch: LowRank | Tensor | None, change: LowRank) -> LowRank | Tensor:
    """`patch + change`: stacked factors while those are fewer numbers than the matrix, then dense.

    At least float32: a merge into bfloat16 would lose small updates and could not be undone.

    >>> import torch
    >>> x = LowRank(torch.ones(4, 1), torch.ones(1, 4), 0.5)
    >>> type(merge(None, x)).__name__, type(merge(merge(None, x), x)).__name__
    ('LowRank', 'Tensor')
    """
    if isinstance(patch, Tensor):
        return patch + change.dense().to(patch)
    total = stack([change] if patch is None else [patch, change])
    d_out, d_in = total.shape
    return total if total.rank * (d_out + d_in) < d_out * d_in else total.dense()


def inner(x: LowRank, y: LowRank) -> float:
    """Frobenius inner product `<x, y> = s_x s_y tr((B_x^T B_y)(A_y A_x^T))`, from factors only.

    Cost `(d_out + d_in) r_x r_y`. Accumulated in float64, so that the norm of a difference computed
    as `<x,x> - 2<x,y> + <y,y>` keeps about half of its digits.

    >>> import torch
    >>> x = LowRank(torch.ones(2, 1), torch.ones(1, 2), 3.0)
    >>> inner(x, x)
    36.0
    """
    left = x.B.double().T @ y.B.double()
    right = y.A.double() @ x.A.double().T
    return x.scaling * y.scaling * float((left * right.T).sum())


def norm(x: LowRank) -> float:
    """Frobenius norm of the product; 0 for the zero update, never negative by rounding."""
    return math.sqrt(max(inner(x, x), 0.0))


def hand_out(G: LowRank, rank: int, scaling: float, split: Split = "B") -> LowRank:
    """The head of a factorised matrix as a client's adapter at its own rank and scaling.

    `G` is in SVD form: `G.B = U S` with orthogonal columns sorted by norm, `G.A = Vh`. The result's
    product is the best rank-`rank` approximation of `G` (Eckart-Young), whatever the scaling:

    - `split="B"`: `A = Vh_r`, `B = U_r S_r / s` (what the FlexLoRA release does),
    - `split="balanced"`: `A = sqrt(S) Vh_r`, `B = U_r sqrt(S) / s`,
    - `split="A"`: `A = S Vh_r`, `B = U_r / s`.

    Directions with `S = 0` keep their row of `A` and a zero column of `B` under every split, so a
    client has `rank` directions to train. One factorisation serves every rank: the cost is a scaled
    copy of the prefix.

    Raises:
        ValueError: `rank` above what `G` holds.
    """
    if rank > G.rank:
        raise ValueError(f"hand_out: rank {rank} asked of a factorisation that holds {G.rank}.")
    head = G.prefix(rank)
    B, A = head.B * (G.scaling / scaling), head.A
    if split != "B":
        S = head.B.norm(dim=0)
        power = 0.5 if split == "balanced" else 1.0
        moved = torch.where(S > 0, S.clamp_min(torch.finfo(S.dtype).tiny) ** power, 1.0)
        B, A = B / moved, A * moved[:, None]
    return LowRank(B, A, scaling)
