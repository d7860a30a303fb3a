"""python docs/figures/curves.py FOLDER

Answer loss of unseen clients (`eval` split) along the rounds, every arm of a one-seed comparison,
here `compare-methods-cpu`: writes docs/images/methods-curves.svg and prints the table beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from flexlora.experiment.compare.results import Result, curve, final, read_cells

IMAGE = Path(__file__).parents[1] / "images" / "methods-curves.svg"
PANELS = {
    "mixed ranks, products": ("flexlora", "memory", "memory-fold", "fedprox", "flora"),
    "mixed ranks, factors": ("hetlora", "rbla", "raflora", "ffa-lora", "rolora"),
    "one rank for all": ("fedavg", "fedit", "fedex-lora", "fedavgm", "fedadam", "slora"),
}
STYLES = (("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", "-.", "^"),
          ("#CC79A7", ":", "D"), ("#555555", "-", "x"), ("#E69F00", "--", "v"))  # fmt: skip


def losses(result: Result, group: str) -> dict[int, float]:
    """Round -> mean answer loss of a group on its `eval` split."""
    return {p.round: p.mean for p in curve(result.metrics, group, "loss")}


def draw(arms: dict[str, Result]) -> None:
    """Three panels with one scale."""
    plt.rcParams.update({"svg.hashsalt": "curves", "font.size": 9})
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True, layout="constrained")
    for axis, (title, names) in zip(axes, PANELS.items(), strict=True):
        for name, (colour, line, mark) in zip(names, STYLES, strict=False):
            found = losses(arms[name], "unseen")
            axis.plot(
                *zip(*found.items(), strict=True), line, color=colour, marker=mark, label=name
            )
        axis.set(title=title, xlabel="round")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("answer loss, unseen clients")
    figure.savefig(IMAGE, metadata={"Date": None})


def main() -> None:
    """Table, then picture."""
    found = {r.arm: r for r in read_cells(Path(sys.argv[1]))}
    rounds = (2, 4, 6, 8)
    print("| arm | " + " | ".join(map(str, rounds)) + " | test, unseen | test, own rank |")
    print("|---" * (len(rounds) + 3) + "|")
    for arm, result in found.items():
        way = losses(result, "unseen")
        ends = (final(result, "global", "unseen", "loss"), final(result, "own", "seen", "loss"))
        last = [sum(end.values()) / len(end) if end else None for end in ends]
        told = [f"{v:.2f}" if v else "-" for v in (*(way.get(n) for n in rounds), *last)]
        print(f"| {arm} | " + " | ".join(told) + " |")
    draw({arm.method: r for arm, r in found.items() if arm.setting == "default"})


if __name__ == "__main__":
    main()
