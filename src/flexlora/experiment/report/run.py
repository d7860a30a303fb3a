"""The report of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from flexlora.experiment import runs
from flexlora.experiment.compare.results import curve, evaluations
from flexlora.experiment.errors import RUN, Failure
from flexlora.experiment.report import charts
from flexlora.experiment.report.page import figures, folded, items, page, paragraph, section, table
from flexlora.experiment.summary import LABELS, NOTE

Metrics = Sequence[Mapping[str, Any]]
UNITS = {"loss": "nats per answer token"}
FLOOR = 1e-7
"""Shares of energy below it are rounding."""


def run_page(folder: Path) -> str:
    """HTML about a run, finished or on its way.

    Raises:
        Failure: nothing was measured yet.
    """
    config, metrics = runs.open_run(folder), runs.read_metrics(folder)
    if not evaluations(metrics):
        raise Failure(f"{folder}: nothing is measured yet; flexlora resume {folder}", RUN)
    about = runs.read(folder / "run.json")
    rounds = [m for m in metrics if m["kind"] == "round"]
    state = "finished" if (folder / "summary.json").is_file() else "not finished"
    lead = (
        f"{config.method.name} on {about['base']} (fingerprint {about['fingerprint']}), "
        f"{len(rounds)} of {config.federation.rounds} rounds, {state}"
    )
    parts = [
        section("Before and after", before_after(metrics), paragraph(NOTE)),
        section("Learning", learning(metrics)),
        section("Gain by category", by_category(metrics)),
        section("What the global update holds", spectra(rounds)),
        section("Who had which rank", who(folder, rounds)),
        section("Costs", costs(rounds), refused(rounds)),
        section("What to conclude", paragraph(
            "One run of one seed describes; it does not show that one method is better than "
            "another. `flexlora compare` runs several under the same conditions and tests.")),
        section("Configuration", folded(
            "config.yaml", (folder / "config.yaml").read_text(encoding="utf-8"))),
    ]  # fmt: skip
    return page(f"Run {folder.resolve().name}", lead, parts)


def tests(metrics: Metrics) -> list[Mapping[str, Any]]:
    """Evaluations of the global model on the `test` split: the base model's first."""
    return evaluations(metrics, split="test", view="global")


def before_after(metrics: Metrics) -> str:
    """Means over clients of the base model and of the last one."""
    found, rows = tests(metrics), []
    for group in ("seen", "unseen"):
        for metric in found[0][group]["mean"]:
            old, new = (line[group]["mean"].get(metric) for line in (found[0], found[-1]))
            after = f"{new:.4f}" if len(found) > 1 and new is not None else "-"
            clients = str(found[0][group]["clients"])
            rows.append([f"{LABELS[metric]}, {group}", clients, f"{old:.4f}", after])
    return table(["mean over clients, test split", "clients", "base model", "trained"], rows)


def learning(metrics: Metrics) -> str:
    """Every metric measured on the way, against rounds and against bytes."""
    drawn = []
    for metric in LABELS:
        found = {g: curve(metrics, g, metric) for g in ("seen", "unseen")}
        found = {f"{g} clients": points for g, points in found.items() if len(points) > 1}
        if not found:
            continue
        unit = UNITS.get(metric, "0 to 1")
        name = LABELS[metric]
        drawn.append(
            charts.lines(
                {g: [(p.round, p.mean) for p in points] for g, points in found.items()},
                f"{name} against rounds",
                "round",
                f"{name} ({unit})",
                note="eval split, global model",
            )
        )
        drawn.append(charts.lines(
            {g: [(p.bytes_up / 1e6, p.mean) for p in points] for g, points in found.items()},
            f"{name} against bytes", "uploaded by all clients (MB)", f"{name} ({unit})",
            note="eval split, global model"))  # fmt: skip
    return figures(*drawn)


def by_category(metrics: Metrics) -> str:
    """What training gained in each category: the loss that went, ROUGE-L that came."""
    found, drawn = tests(metrics), []
    if len(found) < 2:
        return ""
    for group in ("seen", "unseen"):
        for metric, sign in (("loss", -1.0), ("rouge_l", 1.0)):
            old, new = (line[group]["by_category"] for line in (found[0], found[-1]))
            gains = {
                c: sign * (new[c][metric] - old[c][metric])
                for c in old
                if metric in old[c] and metric in new.get(c, {})
            }
            if any(gains.values()):
                gains = dict(sorted(gains.items(), key=lambda item: -item[1])[:40])
                word = "Loss removed" if metric == "loss" else "ROUGE-L gained"
                unit = UNITS.get(metric, "0 to 1")
                title = f"{word} by category, {group} clients"
                drawn.append(charts.bars(gains, title, f"base model to trained ({unit})"))
    return figures(*drawn)


def spectra(rounds: Metrics) -> str:
    """Energy at each rank, the collapse curve with its prediction, the effective rank."""
    told = [r for r in rounds if r["spectra"]["beyond_smallest"] is not None]
    if len(told) < 2:
        return ""
    names = list(told[0]["spectra"]["captured"])
    captured = {
        f"rank {n}": [(r["round"], r["spectra"]["captured"][n]) for r in told] for n in names
    }
    drawn = [
        charts.lines(
            captured, "Energy within each rank", "round", "share of the update's squared norm"
        )
    ]
    if len(names) > 1:
        beyond = {"beyond the smallest rank": collapse(told)}
        kept = kept_without_training(told)
        if kept:
            beyond["predicted: no training from there on"] = kept
        drawn.append(charts.lines(
            {k: [(x, max(y, FLOOR)) for x, y in v] for k, v in beyond.items()},
            "Collapse curve", "round", "share of the energy", log="y",
            note="energy beyond the smallest rank; a round keeps q of it"))  # fmt: skip
    rank = [(r["round"], r["spectra"]["effective_rank"]) for r in told]
    drawn.append(charts.lines({"mean over modules": rank}, "Effective rank", "round",
                              "exp of the entropy of the squared spectrum"))  # fmt: skip
    return figures(*drawn)


def collapse(rounds: Metrics) -> list[tuple[float, float]]:
    """Round -> share of the energy that the smallest rank cannot hold."""
    return [
        (r["round"], r["spectra"]["beyond_smallest"])
        for r in rounds
        if r["spectra"]["beyond_smallest"] is not None
    ]


def kept_without_training(rounds: Metrics) -> list[tuple[float, float]]:
    """What the largest tail would shrink to if no later round added to it: products of q squared.

    q is that of the direction just beyond the smallest rank: the most any tail direction keeps.
    """
    measured = dict(collapse(rounds))
    if not measured:
        return []
    first = max(measured, key=lambda n: (measured[n], -n))
    factors = [_q(r["retention"]) ** 2 for r in rounds if r["round"] > first]
    tail = measured[first] / max(1 - measured[first], 1e-12)
    odds = accumulate(factors, lambda kept, q: kept * q, initial=tail)
    rest = [first, *(r["round"] for r in rounds if r["round"] > first)]
    return [(n, o / (1 + o)) for n, o in zip(rest, odds, strict=True)]


def _q(retention: Mapping[str, float]) -> float:
    """Of the second rank level; in a cohort that holds one level, 1 or 0 would both be guesses."""
    values = sorted(retention.values(), reverse=True)
    return values[1] if len(values) > 1 else 1.0


def who(folder: Path, rounds: Metrics) -> str:
    """Clients and visits at each rank."""
    ranks: dict[str, list[int]] = {}
    if (folder / "summary.json").is_file():
        ranks = runs.read(folder / "summary.json")["ranks"]
    visits: Counter[str] = Counter()
    for r in rounds:
        ranks |= {c: row["ranks"] for c, row in r["clients"].items()}
        visits.update(list(r["clients"]))
    held: dict[str, list[str]] = {}
    for client, each in sorted(ranks.items(), key=lambda item: (max(item[1]), item[0])):
        held.setdefault("/".join(map(str, each)), []).append(client)
    rows = [
        [name, str(len(who)), str(sum(visits[c] for c in who)), _some(who)]
        for name, who in held.items()
    ]
    return table(["rank", "clients", "visits in all", "who"], rows)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def costs(rounds: Metrics) -> str:
    """Bytes and seconds by phase."""
    if not rounds:
        return ""
    phases = list(dict.fromkeys(p for r in rounds for p in r["seconds"]))
    rows = [["uploaded", f"{sum(r['bytes_up'] for r in rounds) / 1e6:.2f} MB"],
            ["downloaded", f"{sum(r['bytes_down'] for r in rounds) / 1e6:.2f} MB"]]  # fmt: skip
    rows += [[p, f"{sum(r['seconds'].get(p, 0.0) for r in rounds):.1f} s"] for p in phases]
    return table(["over all rounds", ""], rows)


def refused(rounds: Metrics) -> str:
    """Who was not admitted."""
    found = [f"round {r['round']}: {x['client']}: {x['message']}" for r in rounds
             for x in r["refused"]]  # fmt: skip
    return paragraph("Refused updates:") + items(found[:50]) if found else ""
