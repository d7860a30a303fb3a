"""The SVD of a weighted sum of products: one entry point, whichever way is cheapest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.lowrank.cost import EXACT, Path, choose
from flexlora.lowrank.estimate import Estimate, Triples
from flexlora.lowrank.exact import core_svd, dense_svd, gram_svd
from flexlora.lowrank.krylov import block_krylov
from flexlora.lowrank.operators import Sum, weighted_sum
from flexlora.lowrank.product import LowRank
from flexlora.lowrank.rounded import has_fast_products, rounded_sum, with_rounding


@dataclass(frozen=True)
class Options:
    """How a sum is factorised; the defaults suit everyone.

    Attributes:
        path: one of :data:`~flexlora.lowrank.cost.Path`, or None: the cheapest by the cost model.
        tolerance: Frobenius error allowed over the best at this rank; 0 allows exact paths only.
        direction_tolerance: relative error allowed in each singular value that is returned.
        dtype: of the arithmetic; None: float32, or wider if the factors are. float64 on request.
        device: of the arithmetic; None: where the factors are. The result lies there too.
        cache_bytes: of cast factors held between passes over one module.
        fast_products: form sums with factors rounded to bfloat16 where a CPU has matrix units for
            that, measure what it costs, and form them again where that is beyond the tolerances.
    """

    path: Path | None = None
    tolerance: float = 0.01
    direction_tolerance: float = 0.05
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    cache_bytes: int = 2**25
    fast_products: bool = True


DEFAULT = Options()


@dataclass(frozen=True)
class Quality:
    """How good a factorisation is, relative to the exact one. Zero on exact paths.

    Attributes:
        path: the way that was taken.
        excess: estimated `||D - D_r||_F` over the best at this rank, minus 1.
        sigma_error: `(rank,)` estimated relative error of each singular value.
        angle: `(rank,)` the residual of each pair half a step before, over `s_j`, for a bound of
            `||D v_j - s_j u_j|| / s_j` and `||D^T u_j - s_j v_j|| / s_j`; the sine of the angle to
            the true subspace is at most this times `s_j / gap` (Wedin).
        applies: vectors multiplied with `D`, 0 on exact paths.
    """

    path: Path
    excess: float
    sigma_error: Float[Tensor, " rank"]
    angle: Float[Tensor, " rank"]
    applies: int


@dataclass(frozen=True)
class Decomposition:
    """A product in SVD form (`B = U S`, `A = Vh`, scaling 1) and how good it is."""

    product: LowRank
    quality: Quality


def svd(product: LowRank, rank: int, seed: int = 0, options: Options = DEFAULT) -> LowRank:
    """The best rank-`rank` approximation of one product, in SVD form: see :func:`decompose`.

    >>> import torch
    >>> d = svd(LowRank(torch.eye(3)[:, :2], torch.eye(2, 4), 5.0), rank=1)
    >>> d.shape, d.rank, round(d.B.norm().item(), 4)
    ((3, 4), 1, 5.0)
    """
    return decompose([product], [1.0], rank, seed, options).product


def svd_sum(
    terms: Sequence[LowRank],
    weights: Sequence[float],
    rank: int,
    seed: int = 0,
    options: Options = DEFAULT,
) -> LowRank:
    """The best rank-`rank` approximation of `sum_k w_k D_k`, in SVD form: see :func:`decompose`."""
    return decompose(terms, weights, rank, seed, options).product


def decompose(
    terms: Sequence[LowRank],
    weights: Sequence[float],
    rank: int,
    seed: int = 0,
    options: Options = DEFAULT,
) -> Decomposition:
    """The best rank-`rank` approximation of `D = sum_k w_k s_k B_k A_k`, with exactly `rank` rows.

    Returns `LowRank(B = U_r S_r, A = Vh_r, scaling = 1)`, singular values descending (they are the
    norms of `B`'s columns). By Eckart-Young no matrix of rank `rank` is closer in any unitarily
    invariant norm, and prefixes of the result are the best approximations at every smaller rank:
    one factorisation serves clients of every rank.

    Where the numerical rank is below `rank`, the missing rows of `A` are orthonormal directions
    outside the row space and `B`'s columns zero (a client then still has `rank` rows to train).

    The way there is chosen by :func:`~flexlora.lowrank.cost.choose` from shapes and ranks: exact
    ones for small modules or total ranks, otherwise block Krylov iteration, to the tolerances of
    `options`; :attr:`Decomposition.quality` says how well it did. Same input, same bits (on one
    machine, with one number of threads). Scales from 1e-20 to 1e20 make no difference.

    Args:
        terms: products of one shape, in any float dtype; read once per pass, in their order.
        weights: one per term.
        rank: rows wanted, at most `min(d_out, d_in)`.
        seed: of the random start and of the directions that fill a degenerate rank.
        options: path, tolerances, dtype, device.

    Raises:
        ValueError: `rank` out of range, no terms, unequal shapes, or numbers that are not finite.
        OverflowError: singular values beyond the dtype's range.
    """
    return decompose_modules([terms], weights, rank, seed, options)[0]


def decompose_modules(
    modules: Sequence[Sequence[LowRank]],
    weights: Sequence[float],
    rank: int,
    seed: int = 0,
    options: Options = DEFAULT,
) -> list[Decomposition]:
    """:func:`decompose` of several modules of equal shape and ranks at once, as batched products.

    For accelerators, where one module alone leaves most of the device idle. All modules go on until
    the last of them meets the tolerances.
    """
    total = weighted_sum(modules, weights, options.dtype, options.device)
    count, d_out, d_in = total.shape
    if not 1 <= rank <= min(d_out, d_in):
        raise ValueError(
            f"svd: rank {rank} of a {d_out} x {d_in} matrix; expected 1 to {min(d_out, d_in)}."
        )
    path = options.path or choose(
        (d_out, d_in),
        len(weights),
        total.rank,
        rank,
        total.dtype.itemsize,
        exact=options.tolerance <= 0,
        fast=_rounds(total, options),
    )
    if path in EXACT:
        U, S, Vh = _exact(total, path, rank)
        none = S.new_zeros(count, rank, dtype=torch.float64)
        exact = Estimate(none, none, none[:, 0], none[:, 0], 0.0)
        found = Triples(U[..., :rank], S[:, :rank], Vh[:, :rank], exact, 0)
    else:
        found = _iterate(total, path, rank, seed, options)
    return [_finish(found, total, path, rank, seed, i) for i in range(count)]


def _exact(total: Sum, path: Path, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    if path == "core":
        return core_svd(*total.stacked(), rank)
    D = total.dense().D
    return gram_svd(D, rank) if path == "gram" and D.dtype == torch.float32 else dense_svd(D)


def _rounds(total: Sum, options: Options) -> bool:
    return options.fast_products and has_fast_products(total.dtype, total.device)


def _iterate(total: Sum, path: Path, rank: int, seed: int, options: Options) -> Triples:
    tolerances = (options.tolerance, options.direction_tolerance)
    if path == "krylov":
        kept = total.keeping(options.cache_bytes)
        return block_krylov(kept, rank, seed, *tolerances, like=total.like)
    if _rounds(total, options):
        D = rounded_sum(total)
        tighter = 0.9 * options.tolerance, 0.9 * options.direction_tolerance
        found = block_krylov(D, rank, seed, *tighter, like=total.like)
        found = with_rounding(found, total, D, seed)  # which takes the rest of the tolerances
        if found.estimate.within(*tolerances):
            return found
        del D
    return block_krylov(total.dense(), rank, seed, *tolerances, like=total.like)


def _finish(found: Triples, total: Sum, path: Path, rank: int, seed: int, i: int) -> Decomposition:
    estimate = found.estimate
    quality = Quality(
        path,
        float(estimate.excess[i]),
        estimate.sigma_error[i].cpu(),
        estimate.angle[i].cpu(),
        found.applies,
    )
    parts = (found.U[i], found.S[i], found.Vh[i])
    return Decomposition(as_product(*parts, total.scale[i].item(), rank, seed), quality)


def as_product(
    U: Float[Tensor, "d_out found"],
    S: Float[Tensor, " found"],
    Vh: Float[Tensor, "found d_in"],
    scale: float,
    rank: int,
    seed: int,
) -> LowRank:
    """`U diag(scale S) Vh` as a product of `rank` rows, missing ones orthonormal at random.

    Raises:
        OverflowError: a singular value beyond the dtype's range.
    """
    found = int(S.gt(10 * torch.finfo(S.dtype).eps * S[0]).sum()) if scale > 0 else 0
    if found < rank:
        Vh = complete_rows(Vh[:found], rank, seed)
        U, S = (torch.nn.functional.pad(x[..., :found], (0, rank - found)) for x in (U, S))
    sigma = S.double() * scale
    if sigma.amax() > torch.finfo(S.dtype).max:
        raise OverflowError(
            f"svd: the largest singular value, {sigma[0].item():.2e}, is beyond {S.dtype}; ask for "
            "Options(dtype=torch.float64)."
        )
    return LowRank(U * sigma.to(S.dtype), Vh)


def complete_rows(
    rows: Float[Tensor, "found d"], count: int, seed: int = 0
) -> Float[Tensor, "count d"]:
    """Orthonormal `rows` extended to `count` orthonormal rows by seeded random directions.

    >>> import torch
    >>> full = complete_rows(torch.eye(4)[:1], 3)
    >>> torch.allclose(full @ full.T, torch.eye(3), atol=1e-6)
    True
    """
    d = rows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(count - rows.shape[0], d, generator=generator, dtype=torch.float64)
    fresh = fresh.to(rows)
    for _ in range(2):  # twice is enough (Kahan): the second pass removes what rounding left
        fresh = fresh - (fresh @ rows.T) @ rows
        fresh = torch.linalg.qr(fresh.T)[0].T
    return torch.cat([rows, fresh])
