"""A comparison as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from flexlora.experiment.compare.grid import Arm, Comparison
from flexlora.experiment.compare.results import Result, final
from flexlora.experiment.compare.statistics import smallest_detectable
from flexlora.experiment.compare.verdicts import (
    Chosen,
    at_equal_bytes,
    at_equal_memory,
    byte_budget,
    primary_group,
    spread,
    to_json,
    verdicts,
)
from flexlora.experiment.summary import LABELS

VIEWS = {"global": "full server state", "exported": "exported at one rank", "own": "own rank"}


def summarise(comparison: Comparison, chosen: Chosen, refused: Mapping[str, str]) -> dict[str, Any]:
    """Everything a reader needs, as plain data.

    Conclusions are drawn from one number per arm: `metric`, on unseen clients, the full server
    state, after all rounds. All else describes.
    """
    group, metric = primary_group(chosen), comparison.metric

    def reading(result: Result) -> dict[str, float]:
        return final(result, "global", group, metric)

    rows = [arm_row(arm, cells) for arm, cells in chosen.items()]
    means = {
        arm: row["means"]["global"][group][metric]
        for arm, row in zip(chosen, rows, strict=True)
        if metric in row["means"]["global"].get(group, {})
    }
    found = verdicts(comparison, chosen, reading)
    seen_spread = spread(chosen, reading) if chosen else None
    counts = {"seeds": len(comparison.seeds), "clients": 0}
    if found:
        counts["clients"] = max(v.effect.clients for v in found)
    return {
        "metric": metric,
        "group": group,
        "reference": str(next(iter(chosen), "")),
        "margin": comparison.margin,
        "alpha": comparison.alpha,
        "seeds": list(comparison.seeds),
        "arms": rows,
        "refused": dict(refused),
        "verdicts": [to_json(v) for v in found],
        "spread": seen_spread,
        "smallest_detectable": seen_spread
        and smallest_detectable(
            counts["seeds"], counts["clients"], seen_spread, max(len(found), 1), comparison.alpha
        ),
        "equal_bytes": {
            "budget": byte_budget(chosen, group, "loss"),
            "means": {str(a): v for a, v in at_equal_bytes(chosen, group, "loss").items()},
        },
        "equal_memory": {
            str(budget): str(arm) for budget, arm in at_equal_memory(chosen, means, metric).items()
        },
    }


def arm_row(arm: Arm, cells: Mapping[int, Result]) -> dict[str, Any]:
    """One arm: its means over clients and seeds, three views, and its costs, means over seeds."""
    results = list(cells.values())
    first = results[0].about
    means: dict[str, dict[str, dict[str, float]]] = {}
    for view in VIEWS:
        for group in ("seen", "unseen"):
            for metric in LABELS:
                values = [
                    fmean(v.values()) for r in results if (v := final(r, view, group, metric))
                ]
                if values:
                    means.setdefault(view, {}).setdefault(group, {})[metric] = fmean(values)
    costs = ("rounds", "seconds", "server_seconds", "bytes_up", "bytes_down", "flops")
    return {
        "arm": str(arm),
        "citation": first["citation"],
        "bound": first["bound"],
        "notes": first["notes"],
        "learning_rate": first["learning_rate"],
        "seeds": sorted(cells),
        "clients_per_rank": {name: level["clients"] for name, level in first["levels"].items()},
        "export_rank": (first["exported"] or {}).get("rank"),
        "peak_client_bytes": max(r.peak_bytes for r in results),
        **{name: fmean(r.about[name] for r in results) for name in costs},
        "means": {view: means.get(view, {}) for view in VIEWS},
    }


def as_csv(chosen: Chosen) -> str:
    """One row per cell, view, group and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["method", "ranks", "setting", "seed", "learning_rate", "view", "clients", "metric", "mean"]
    )
    for arm, cells in chosen.items():
        for seed, result in sorted(cells.items()):
            for view in VIEWS:
                for group in ("seen", "unseen"):
                    for metric in LABELS:
                        if values := final(result, view, group, metric):
                            key = [arm.method, arm.ranks, arm.setting, seed, result.rate]
                            writer.writerow([*key, view, group, metric, fmean(values.values())])
    return out.getvalue()


def as_markdown(found: Mapping[str, Any]) -> str:
    """The tables that people read."""
    group, metric = found["group"], found["metric"]
    parts = [
        "# Comparison",
        f"{LABELS[metric]} of {group} clients, mean over clients and {len(found['seeds'])} seeds; "
        f"differences are to {found['reference']}.",
        markdown(*scores_table(found)),
        "## Conclusions",
        *conclusions(found),
        "## Costs",
        markdown(*cost_table(found)),
        "## Equal budgets",
        *budgets(found),
    ]
    if found["refused"]:
        parts.append("## Refused")
        parts += [f"- {name}: {why}" for name, why in found["refused"].items()]
    return "\n\n".join(parts) + "\n"


def scores_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Arms down, views and metrics across."""
    group = found["group"]
    columns = [("global", group, m) for m in LABELS]
    columns += [("exported", group, found["metric"]), ("own", "seen", found["metric"])]

    def value(row: Mapping[str, Any], view: str, who: str, metric: str) -> float | None:
        number: float | None = row["means"][view].get(who, {}).get(metric)
        return number

    columns = [c for c in columns if any(value(row, *c) is not None for row in found["arms"])]
    heads = [
        LABELS[m] + ("" if view == "global" else f", {VIEWS[view]}" + ", seen" * (who != group))
        for view, who, m in columns
    ]
    rows = []
    for row in found["arms"]:
        numbers = [value(row, *c) for c in columns]
        cells = ["-" if n is None else f"{n:.4f}" for n in numbers]
        rows.append([row["arm"], f"{row['learning_rate']:g}", str(len(row["seeds"])), *cells])
    return ["arm", "learning rate", "seeds", *heads], rows


def cost_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What each arm took, per run."""
    heads = ["arm", "rounds", "MB up", "MB down", "peak client MB", "training TFLOP", "server s"]
    rows = [
        [
            row["arm"],
            f"{row['rounds']:g}",
            *(f"{row[name] / 1e6:.2f}" for name in ("bytes_up", "bytes_down")),
            f"{row['peak_client_bytes'] / 1e6:.1f}",
            f"{row['flops'] / 1e12:.4g}",
            f"{row['server_seconds']:.2f}",
        ]
        for row in found["arms"]
    ]
    return heads, rows


def conclusions(found: Mapping[str, Any]) -> list[str]:
    """One line per arm, and what the test could have found at all."""
    lines = [f"- {v['arm']}: {v['said']}" for v in found["verdicts"]]
    if not lines:
        lines = ["Nothing to conclude: no two arms share a seed and clients."]
    least = found["smallest_detectable"]
    if least:
        lines.append(
            f"With the spread seen here, a difference of {least:.3g} is found 4 times in 5; "
            "smaller ones usually are not."
        )
    return lines


def budgets(found: Mapping[str, Any]) -> list[str]:
    """Uploaded bytes and client memory held equal; equal rounds is the first table."""
    lines = []
    if equal := found["equal_bytes"]["means"]:
        budget = found["equal_bytes"]["budget"] / 1e6
        lines.append(
            f"Answer loss of {found['group']} clients on the `eval` split, at the last evaluation "
            f"within {budget:.2f} MB uploaded in all:"
        )
        rows = [[arm, f"{v:.4f}"] for arm, v in sorted(equal.items(), key=lambda item: item[1])]
        lines.append(markdown(["arm", "answer loss"], rows))
    if found["equal_memory"]:
        lines.append(
            "Best mean among the arms whose largest client fits into a memory (base weights, "
            "factors, gradients, optimiser; activations on top). It describes; it is no test:"
        )
        rows = [[f"{int(b) / 1e6:.1f}", arm] for b, arm in found["equal_memory"].items()]
        lines.append(markdown(["client memory, MB", "arm"], rows))
    return lines


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
