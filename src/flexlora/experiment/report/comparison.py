"""The report of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from flexlora.experiment import runs
from flexlora.experiment.compare.results import Result, curve, evaluations, read_cells
from flexlora.experiment.compare.run import RESULT
from flexlora.experiment.compare.tables import conclusions, cost_table, scores_table
from flexlora.experiment.report import charts
from flexlora.experiment.report.page import figures, folded, items, page, paragraph, section, table
from flexlora.experiment.report.run import FLOOR, UNITS, collapse
from flexlora.experiment.summary import LABELS

Cells = Mapping[str, Sequence[Result]]
"""Arm -> its cells at the chosen learning rate."""


def comparison_page(folder: Path) -> str:
    """HTML about a comparison."""
    found = runs.read(folder / RESULT)
    rates = {row["arm"]: row["learning_rate"] for row in found["arms"]}
    cells: dict[str, list[Result]] = {arm: [] for arm in rates}
    for result in read_cells(folder):
        if rates.get(str(result.arm)) == result.rate:
            cells[str(result.arm)].append(result)
    metric, group = found["metric"], found["group"]
    lead = (
        f"{len(cells)} arms, seeds {', '.join(map(str, found['seeds']))}; {LABELS[metric]} of "
        f"{group} clients decides, and {found['reference']} is what the others are compared with. "
        "Every arm met the same cohorts, initial factors and data order under each seed."
    )
    parts = [
        section("What to conclude", *said(found)),
        section("Scores", table(*scores_table(found)), paragraph(
            "Means over clients and seeds, test split, after all rounds; the full server state "
            "unless a column says otherwise.")),
        section("Learning", learning(cells, group)),
        section("Gain by category", by_category(cells, group)),
        section("What the global update holds", spectra(cells)),
        section("Who had which rank", table(["arm", "clients per rank"], [
            [row["arm"], ", ".join(f"{n} at {r}" for r, n in row["clients_per_rank"].items())]
            for row in found["arms"]])),
        section("Costs of a run", table(*cost_table(found)), paragraph(
            "Mean over seeds. Peak client memory: base weights, frozen terms, factors, gradients "
            "and optimiser of the largest client; activations come on top and are the same for "
            "all.")),
        section("Equal budgets", *equal(found)),
        section("Learning rates", paragraph(rates_said(folder, found))),
        section("Refused", items([f"{arm}: {why}" for arm, why in found["refused"].items()])),
        section("Methods", items([f"{row['arm']}: {row['citation']}" for row in found["arms"]
                                  if row["citation"]])),
        section("Configuration", folded(
            "comparison.yaml", (folder / "comparison.yaml").read_text(encoding="utf-8"))),
    ]  # fmt: skip
    return page(f"Comparison {folder.resolve().name}", lead, parts)


def said(found: Mapping[str, Any]) -> list[str]:
    """Verdicts in words, and their intervals as a picture where there are any."""
    lines = [line.removeprefix("- ") for line in conclusions(found)]
    spans = {
        v["arm"]: (v["difference"], *v["interval"]) for v in found["verdicts"] if v["interval"]
    }
    unit = UNITS.get(found["metric"], "0 to 1")
    drawn = ""
    if spans:
        title, note = f"Difference in {LABELS[found['metric']]}", f"arm minus {found['reference']}"
        x = f"with 95 % intervals ({unit})"
        drawn = charts.intervals(spans, found["margin"], title, x, note)
    how = (
        "Paired by client and seed; hierarchical bootstrap over seeds, categories and clients; "
        f"Holm's adjustment over all arms at {found['alpha']:g}; the intervals are not adjusted."
    )
    return [items(lines), figures(drawn), paragraph(how) if spans else ""]


def learning(cells: Cells, group: str) -> str:
    """Mean curves over seeds, against rounds and against bytes."""
    drawn = []
    for metric in LABELS:
        rounds: dict[str, charts.Line] = {}
        bytes_up: dict[str, charts.Line] = {}
        for arm, results in cells.items():
            curves = [c for r in results if len(c := curve(r.metrics, group, metric)) > 1]
            steps = [*zip(*curves, strict=False)]
            if len(steps) < 2:
                continue
            rounds[arm] = [(s[0].round, fmean(p.mean for p in s)) for s in steps]
            if not results[0].about["bound"]:
                bytes_up[arm] = [
                    (fmean(p.bytes_up for p in s) / 1e6, fmean(p.mean for p in s)) for s in steps
                ]
        unit, name = UNITS.get(metric, "0 to 1"), LABELS[metric]
        for series, over, x in (
            (rounds, "rounds", "round"),
            (bytes_up, "bytes", "uploaded by all clients (MB)"),
        ):
            if series:
                title = f"{name} against {over}, {group} clients"
                drawn.append(charts.lines(series, title, x, f"{name} ({unit})",
                                          note="eval split, mean over seeds"))  # fmt: skip
    return figures(*drawn)


def by_category(cells: Cells, group: str, most: int = 12) -> str:
    """A table: loss removed from the base model's, arms down, categories across."""
    gains: dict[str, dict[str, list[float]]] = {}
    for arm, results in cells.items():
        for r in results:
            lines = evaluations(r.metrics, split="test", view="global")
            if len(lines) < 2:
                continue
            old, new = (line[group]["by_category"] for line in (lines[0], lines[-1]))
            for c in old.keys() & new.keys():
                if "loss" in old[c] and "loss" in new[c]:
                    gain = old[c]["loss"] - new[c]["loss"]
                    gains.setdefault(c, {}).setdefault(arm, []).append(gain)
    shown = sorted(gains)[:most]
    rows = [
        [arm, *(f"{fmean(gains[c][arm]):+.3f}" if arm in gains[c] else "-" for c in shown)]
        for arm in cells
        if any(arm in row for row in gains.values())
    ]
    note = "Answer loss removed (nats per token), test split, mean over seeds."
    more = f" The first {most} of {len(gains)} categories." if len(gains) > most else ""
    return table(["arm", *shown], rows) + paragraph(note + more) if rows else ""


def spectra(cells: Cells) -> str:
    """Collapse curves and energy at the last round, of the first seed of each arm."""
    curves, energy = dict[str, charts.Line](), list[list[str]]()
    for arm, results in cells.items():
        rounds = [m for m in results[0].metrics if m["kind"] == "round"] if results else []
        points = collapse(rounds)
        if not points:
            continue
        captured = rounds[-1]["spectra"]["captured"]
        effective = f"{rounds[-1]['spectra']['effective_rank']:.2f}"
        held = ", ".join(f"{v:.4f} within {r}" for r, v in captured.items() if v is not None)
        energy.append([arm, effective, held])
        if len(points) > 1 and len(captured) > 1:
            curves[arm] = [(n, share) for n, share in points if share > FLOOR] or [(1, FLOOR)]
    drawn = ""
    if curves:
        drawn = charts.lines(
            curves, "Collapse: energy beyond the smallest rank", "round", "share of the energy",
            log="y", note="global update, first seed")  # fmt: skip
    heads = ["arm", "effective rank", "share of the energy, last round"]
    return figures(drawn) + table(heads, energy)


def equal(found: Mapping[str, Any]) -> list[str]:
    """At equal bytes and at equal memory; equal rounds is the table of scores."""
    parts = []
    if means := found["equal_bytes"]["means"]:
        budget = found["equal_bytes"]["budget"] / 1e6
        parts.append(charts.bars(
            dict(sorted(means.items(), key=lambda item: item[1])),
            f"Answer loss within {budget:.2f} MB uploaded in all, {found['group']} clients",
            "nats per answer token", note="eval split, last one within the budget"))  # fmt: skip
    rows = [[f"{int(b) / 1e6:.1f}", arm] for b, arm in found["equal_memory"].items()]
    head = ["a client's memory, MB", "lowest mean that fits (no test)"]
    return [figures(*parts), table(head, rows)]


def rates_said(folder: Path, found: Mapping[str, Any]) -> str:
    """What was tried and what was taken; a choice at the edge of the grid is told."""
    tried = sorted({r.rate for r in read_cells(folder)})
    if len(tried) < 2:
        return f"One for all: {', '.join(f'{r:g}' for r in tried)}."
    ends = [row["arm"] for row in found["arms"] if row["learning_rate"] in (tried[0], tried[-1])]
    told = f"Tried for every arm: {', '.join(f'{r:g}' for r in tried)}, chosen on seen clients."
    return told + (f" At the edge of the grid: {', '.join(ends)}." if ends else "")
