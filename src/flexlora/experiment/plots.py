"""The picture of a run: answer loss over the rounds, from `metrics.jsonl` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexlora.experiment.runs import read_metrics

COLOURS = {"seen": "#1f6f8b", "unseen": "#d1603d"}


def curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Group of clients -> `(round, mean answer loss)` of the global model, all on one split.

    That is the split measured on the way, or the test split of a run measured at its ends only.
    """
    lines = [m for m in metrics if m["kind"] == "evaluation" and m["view"] == "global"]
    split = "eval" if any(m["split"] == "eval" for m in lines) else "test"
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for group in ("seen", "unseen"):
            loss = line.get(group, {}).get("mean", {}).get("loss")
            if line["split"] == split and loss is not None:
                found.setdefault(group, []).append((line["round"], loss))
    return found


def plot_loss(folder: Path) -> list[Path]:
    """Write `loss.svg` and `loss.png` into a run directory; nothing where matplotlib is absent."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    found = curves(read_metrics(folder))
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for group, points in found.items():
        rounds, losses = zip(*points, strict=True)
        axes.plot(
            rounds, losses, "o-", color=COLOURS[group], label=f"{group} clients", lw=1.8, ms=4
        )
        axes.axhline(losses[0], color=COLOURS[group], lw=0.8, ls=":", alpha=0.7)
    axes.set(xlabel="round", ylabel="held-out answer loss (nats per token)", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if found:
        axes.legend(frameon=False, title="dotted: base model", title_fontsize="small")
    paths = [folder / "loss.svg", folder / "loss.png"]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths
