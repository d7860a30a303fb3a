"""How fast is one module's aggregation, and how close to the best rank-r matrix?

    python benchmarks/aggregation.py --quick     # four cases, under 3 minutes
    python benchmarks/aggregation.py             # and 4096 x 14336: its dense SVD takes long
    python benchmarks/aggregation.py --grid      # every path on a grid: is the cheapest one chosen?
    python benchmarks/aggregation.py --one-core  # CPU seconds of one thread: for a busy machine
    python benchmarks/aggregation.py --no-fast-products   # as on a CPU without AMX

Compares `flexlora.lowrank.svd_sum` with the straightforward way (the weighted dense sum, a full
SVD, a slice per distinct rank), with QR of the stacked factors, and with `torch.svd_lowrank` on the
dense sum. The result is checked against the dense one first, then timed: best of 2.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch

from flexlora.lowrank import LowRank, Options, Path, choose, decompose, hand_out
from flexlora.lowrank.rounded import has_fast_products

MIXES = {
    "homogeneous": {8: 1.0},
    "heavy-tail-light": {8: 0.8, 30: 0.1, 200: 0.1},
    "heavy-tail-strong": {8: 0.05, 30: 0.15, 200: 0.8},
    "uniform": {8: 0.25, 30: 0.25, 200: 0.5},
    "uniform-attention": {8: 0.25, 30: 0.5, 200: 0.25},
    "heavy-tail-light-mlp": {8: 0.8, 30: 0.05, 200: 0.15},
}
"""Rank -> share. Type 3 of the paper has rank 30 in attention (square here) and 200 in the MLP."""

HERE = torch.float32, torch.device("cpu")

SPECTRA = {"decaying": (1.0, 0.5), "slow": (0.5, 1.0)}
"""Exponent of the common signal's singular values, `j^-a`, and noise per factor, relative to it."""


@dataclass(frozen=True)
class Case:
    """One module in one federation."""

    d_out: int
    d_in: int
    mix: str
    cohort: int = 80
    spectrum: str = "decaying"

    @property
    def ranks(self) -> list[int]:
        """Rank of each client."""
        return [
            r for r, share in MIXES[self.mix].items() for _ in range(round(share * self.cohort))
        ]


CASES = [
    Case(2048, 2048, "homogeneous"),
    Case(2048, 2048, "heavy-tail-light"),
    Case(5504, 2048, "uniform"),
    Case(2048, 2048, "heavy-tail-strong"),
    Case(4096, 14336, "heavy-tail-light-mlp"),
]


def cohort(case: Case, seed: int = 0) -> list[LowRank]:
    """Updates as trained ones look: a decaying common signal, cut at each rank, plus noise.

    Every factor is that of the common signal (which all clients share, as they all start from one
    adapter) plus independent Gaussian noise of a relative Frobenius norm of its own.
    """
    exponent, noise = SPECTRA[case.spectrum]
    g = torch.Generator().manual_seed(seed)
    top = max(case.ranks)
    U = torch.linalg.qr(torch.randn(case.d_out, top, generator=g))[0]
    V = torch.linalg.qr(torch.randn(case.d_in, top, generator=g))[0]
    root = torch.arange(1.0, top + 1) ** (-exponent / 2)

    def noisy(X: torch.Tensor) -> torch.Tensor:
        fresh = torch.randn(X.shape, generator=g)
        return (X + noise * X.norm() / X.numel() ** 0.5 * fresh).contiguous()

    scale = 16.0
    return [
        LowRank(noisy(U[:, :r] * root[:r]), noisy((V[:, :r] * root[:r]).T), scale / r)
        for r in case.ranks
    ]


def dense_sum(terms: Sequence[LowRank], weights: Sequence[float]) -> torch.Tensor:
    """The straightforward weighted sum."""
    total = torch.zeros(terms[0].shape)
    for term, weight in zip(terms, weights, strict=True):
        total += weight * term.scaling * (term.B @ term.A)
    return total


def dense(terms: Sequence[LowRank], weights: Sequence[float], rank: int) -> LowRank:
    """The straightforward way."""
    U, S, Vh = torch.linalg.svd(dense_sum(terms, weights), full_matrices=False)
    return LowRank(U[:, :rank] * S[:rank], Vh[:rank])


def torch_lowrank(terms: Sequence[LowRank], weights: Sequence[float], rank: int) -> LowRank:
    """`torch.svd_lowrank` of the dense sum: 10 columns more than the rank, its default 2 rounds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(dense_sum(terms, weights), q=rank + 10)
    return LowRank(U[:, :rank] * S[:rank], V.T[:rank])


def best_of(times: int, run: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs, more of them if they are short.

    With one thread these are seconds of that core: the same as on the clock of an idle machine, and
    nearly the same on a busy one.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: list[float] = []
    while len(seconds) < times or sum(seconds) < 1:
        start = clock()
        run()
        seconds.append(clock() - start)
    return min(seconds)


def measure(case: Case, options: Options) -> dict[str, object]:
    """Check one case against the dense way, then time all ways."""
    terms, ranks = cohort(case), sorted(set(case.ranks))
    rank, weights = ranks[-1], [1 / len(terms)] * len(terms)
    exact = dense(terms, weights, rank)
    total = dense_sum(terms, weights).double()
    best = (total - exact.B.double() @ exact.A.double()).norm()

    def excess(x: LowRank) -> float:
        return float((total - x.B.double() @ x.A.double()).norm() / best) - 1

    ours = decompose(terms, weights, rank, options=options)
    assert excess(ours.product) < 0.02, f"{case}: {excess(ours.product):.4f} above the best rank-r"
    sigma = exact.B.norm(dim=0)
    direction = float((1 - ours.product.B.norm(dim=0) / sigma).abs().max())

    def server() -> list[LowRank]:
        G = decompose(terms, weights, rank, options=options).product
        return [hand_out(G, r, 16 / r) for r in ranks]

    def straightforward() -> list[LowRank]:
        G = dense(terms, weights, rank)
        return [LowRank(G.B[:, :r] / (16 / r), G.A[:r], 16 / r) for r in ranks]

    seconds = best_of(2, server)
    dense_seconds = best_of(1 if case.d_out * case.d_in > 2**25 else 2, straightforward)
    stacked = None
    if sum(case.ranks) < 4 * min(case.d_out, case.d_in):
        stacked = best_of(1, lambda: decompose(terms, weights, rank, options=Options(path="core")))
    lowrank = torch_lowrank(terms, weights, rank)
    return {
        "d_out": case.d_out,
        "d_in": case.d_in,
        "mix": case.mix,
        "cohort": len(terms),
        "sum_ranks": sum(case.ranks),
        "rank": rank,
        "spectrum": case.spectrum,
        "path": ours.quality.path,
        "seconds": round(seconds, 4),
        "dense_seconds": round(dense_seconds, 3),
        "stacked_seconds": stacked and round(stacked, 3),
        "svd_lowrank_seconds": round(best_of(2, lambda: torch_lowrank(terms, weights, rank)), 4),
        "svd_lowrank_excess": round(excess(lowrank), 5),
        "speedup": round(dense_seconds / seconds, 1),
        "excess_error": round(excess(ours.product), 6),
        "estimated_excess": round(ours.quality.excess, 6),
        "worst_sigma_error": round(direction, 5),
        "estimated_sigma_error": round(float(ours.quality.sigma_error.max()), 5),
    }


def show(row: dict[str, object]) -> str:
    """One line of the table."""
    stacked = row["stacked_seconds"] or float("nan")
    return (
        f"{row['d_out']:>5} x {row['d_in']:<5} {row['mix']:<21} {row['spectrum']:<8} "
        f"{row['sum_ranks']:>6} {row['rank']:>4}  {row['path']:<12} {row['seconds']:>8.3f} "
        f"{row['dense_seconds']:>8.2f} {stacked:>8.2f} {row['svd_lowrank_seconds']:>8.3f} "
        f"{row['speedup']:>7.1f}x {row['excess_error']:>9.5f} {row['estimated_excess']:>9.5f} "
        f"{row['worst_sigma_error']:>9.4f} {row['estimated_sigma_error']:>9.4f} "
        f"{row['svd_lowrank_excess']:>9.4f}"
    )


HEAD = (
    f"{'shape':<13} {'mix':<21} {'spectrum':<8} {'sum r':>6} {'r':>4}  {'path':<12} {'ours s':>8} "
    f"{'dense s':>8} {'stacked':>8} {'lowrank':>8} {'speed-up':>8} {'excess':>9} {'estimate':>9} "
    f"{'sigma':>9} {'estimate':>9} {'lowrank excess':>9}"
)


def all_paths(case: Case, options: Options) -> dict[str, object]:
    """Seconds of every path that can be the fastest, and how far the chosen one is from it."""
    terms, rank, total = cohort(case), max(case.ranks), sum(case.ranks)
    weights = [1 / len(terms)] * len(terms)
    seconds = {}
    for path in get_args(Path):
        if path != "core" or total <= 3 * min(case.d_out, case.d_in):
            forced = replace(options, path=path)
            seconds[path] = best_of(3, partial(decompose, terms, weights, rank, options=forced))
    shape = case.d_out, case.d_in
    chosen = choose(shape, len(terms), total, rank, fast=options.fast_products)
    fastest = min(seconds, key=seconds.__getitem__)
    return {
        "d_out": case.d_out,
        "d_in": case.d_in,
        "mix": case.mix,
        "cohort": len(terms),
        "sum_ranks": total,
        "rank": rank,
        "chosen": chosen,
        "fastest": fastest,
        "ratio": round(seconds[chosen] / seconds[fastest], 2),
        "seconds": {k: round(v, 4) for k, v in seconds.items()},
    }


GRID = [
    Case(d_out, d_in, mix, clients)
    for d_out, d_in in ((512, 512), (576, 1536), (2048, 2048), (1024, 4096))
    for mix in ("homogeneous", "heavy-tail-light", "uniform", "heavy-tail-strong")
    for clients in (4, 20, 80)
]


def main() -> None:
    """Run the cases or the grid; a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without the fifth case")
    parser.add_argument("--grid", action="store_true", help="the choice of path against all paths")
    parser.add_argument("--spectrum", choices=SPECTRA, default="decaying")
    parser.add_argument("--one-core", action="store_true", help="one thread, its CPU seconds")
    parser.add_argument("--no-fast-products", action="store_true", help="as without AMX")
    args = parser.parse_args()
    options = Options(fast_products=has_fast_products(*HERE) and not args.no_fast_products)
    if args.one_core:
        torch.set_num_threads(1)
    threads = torch.get_num_threads()
    if args.grid:
        rows = []
        for case in GRID:
            rows.append(all_paths(case, options))
            print(*rows[-1].values(), flush=True)
        worst = max(float(str(r["ratio"])) for r in rows)
        summary = {"fast_products": options.fast_products, "worst_ratio": worst, "cases": len(rows)}
        print(json.dumps({"threads": threads, **summary}))
        return
    print(HEAD)
    rows = []
    for case in CASES[:4] if args.quick else CASES:
        row = measure(Case(case.d_out, case.d_in, case.mix, case.cohort, args.spectrum), options)
        rows.append(row)
        print(show(row), flush=True)
    summary = {
        "threads": threads,
        "fast_products": options.fast_products,
        "cases": rows,
        "min_speedup": min(float(str(r["speedup"])) for r in rows),
        "max_excess_error": max(float(str(r["excess_error"])) for r in rows),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
