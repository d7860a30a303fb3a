"""python docs/figures/aggregation.py

CPU seconds, on one core, of one module's aggregation (2048 x 2048, float32) against the number of
clients (heavy-tail-light, 10 to 1,000) and against the sum of ranks (80 clients, ranks 1 to 200):
this package, the dense sum with a full SVD, and QR of the stacked factors. Takes a few minutes;
writes docs/images/aggregation.json and docs/images/aggregation.svg. With --draw, only draws again.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from aggregation import MIXES, Case, best_of, cohort, dense

from flexlora.lowrank import Options, decompose

IMAGE = Path(__file__).parents[1] / "images" / "aggregation.svg"
SIZE = 2048


def seconds(case: Case) -> dict[str, float]:
    """Of each way, best of 2; QR of the stacked factors only up to a sum of ranks of 4,096."""
    terms, rank, total = cohort(case), max(case.ranks), sum(case.ranks)
    weights = [1 / len(terms)] * len(terms)
    found = {
        "sum_ranks": total,
        "flexlora": best_of(2, partial(decompose, terms, weights, rank)),
        "dense sum, SVD": best_of(2, partial(dense, terms, weights, rank)),
    }
    if total <= 2 * SIZE:
        core = partial(decompose, terms, weights, rank, options=Options(path="core"))
        found["QR of the stack"] = best_of(2, core)
    return found


def measure() -> dict[str, list[dict[str, float]]]:
    """Both panels."""
    clients = []
    for count in (10, 20, 40, 80, 160, 320, 640, 1000):
        row = seconds(Case(SIZE, SIZE, "heavy-tail-light", count))
        clients.append({"clients": count, **row})
    ranks = []
    for rank in (1, 2, 4, 8, 16, 32, 64, 128, 200):
        MIXES["all at one"] = {rank: 1.0}
        ranks.append({"rank": rank, **seconds(Case(SIZE, SIZE, "all at one", 80))})
    return {"clients": clients, "ranks": ranks}


def draw(measured: dict[str, list[dict[str, float]]]) -> None:
    """Two panels, logarithmic."""
    plt.rcParams.update({"svg.hashsalt": "aggregation", "font.size": 9})
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.9), sharey=True)
    panels = [("clients", "clients", "clients (heavy-tail-light)"),
              ("ranks", "sum_ranks", "sum of ranks (80 clients)")]  # fmt: skip
    for axis, (panel, x, label) in zip(axes, panels, strict=True):
        rows = measured[panel]
        for way, style in (
            ("flexlora", "o-"),
            ("dense sum, SVD", "s--"),
            ("QR of the stack", "^:"),
        ):
            points = [(row[x], row[way]) for row in rows if way in row]
            axis.loglog(*zip(*points, strict=True), style, label=way, markersize=4)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds (one core)")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(IMAGE, metadata={"Date": None})


def main() -> None:
    """Measure unless only drawing, then draw."""
    torch.set_num_threads(1)
    data = IMAGE.with_suffix(".json")
    if "--draw" not in sys.argv:
        data.write_text(json.dumps(measure(), indent=1) + "\n")
    draw(json.loads(data.read_text()))


if __name__ == "__main__":
    main()
