"""What a run ends with: the object that programs read, and the table that people read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexlora.experiment.workshop import Workshop
from flexlora.federation.ranks import count
from flexlora.federation.round import RoundRecord
from flexlora.federation.sampling import coverage

LABELS = {
    "loss": "answer loss",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
    "score": "task's own score",
    "rouge_l_teacher_forced": "ROUGE-L, teacher-forced (as released)",
}
NAMED = 6
"""Clients of a round that are told by name; of more, only how many there are of each rank."""
NOTE = (
    "A lower loss alone may be format learning: how an answer looks, not whether it is right; "
    "exact match and the answers below say more."
)


def summarise(
    folder: Path, before: Mapping[str, Any], after: Mapping[str, Any], **rest: Any
) -> dict[str, Any]:
    """The last line of `run --format json`; means over clients, each counting once.

    Args:
        folder: of the run.
        before: evaluation of the base model.
        after: of the trained one; a group without a model of its own is left out.
        rest: `seconds`, `rounds`, `ranks` and what else is known.
    """
    groups = {}
    for group in ("seen", "unseen"):
        old, new = before[group], after.get(group)
        groups[group] = {"clients": old["clients"]}
        for metric in ("loss", "rouge_l", *(m for m in LABELS if m in old["mean"])):
            name = "answer_loss" if metric == "loss" else metric
            groups[group][f"{name}_before"] = old["mean"].get(metric)
            groups[group][f"{name}_after"] = new["mean"].get(metric) if new else None
    return {"run_dir": str(folder), **rest, **groups}


def describe(summary: Mapping[str, Any]) -> str:
    """The table of a finished run."""
    lines = [f"{'':24}{'seen clients':>26}{'unseen clients':>26}"]
    lines.append(f"{'':24}" + "".join(f"{summary[g]['clients']:>26}" for g in ("seen", "unseen")))
    for metric, label in LABELS.items():
        name = "answer_loss" if metric == "loss" else metric
        cells = [_cell(summary[g], name) for g in ("seen", "unseen")]
        if any(cells):
            lines.append(f"{label:24}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join([*lines, "", NOTE])


def _cell(group: Mapping[str, Any], name: str) -> str:
    before, after = group.get(f"{name}_before"), group.get(f"{name}_after")
    if before is None:
        return ""
    if after is None:
        return f"{before:.3f} -> -"
    change = f" ({after / before - 1:+.0%})" if name == "answer_loss" and before else ""
    return f"{before:.3f} -> {after:.3f}{change}"


def introduction(shop: Workshop) -> str:
    """What is about to run, in a few lines."""
    e = shop.experiment
    ranks = count({c: client.lora.r for c, client in e.clients.items()})
    schedule, seed = e.schedule, e.config.federation.seed
    covered = coverage(
        seed, schedule.rounds, list(e.clients), schedule.cohort_size, schedule.drop_out
    )
    lines = [
        f"{shop.base.name} (fingerprint {shop.base.fingerprint}), {e.config.method.name}, "
        f"{schedule.setting}",
        f"{len(e.seen)} seen and {len(e.unseen)} unseen clients; clients per rank: "
        + ", ".join(f"{n} at {r}" for r, n in ranks.items()),
        f"{schedule.rounds} rounds, {schedule.cohort_size} clients a round: {covered}",
        *e.notes,
    ]
    return "\n".join(lines)


def round_line(record: RoundRecord, rounds: int, seconds: float) -> str:
    """One line of progress."""
    if record.empty:
        told = "nobody answered, the model stays as it was"
    else:
        told = f"{_who(record)}; training loss {record.metrics['loss']:.3f}, "
        told += f"{record.bytes_up / 1e6:.1f} MB up, {record.bytes_down / 1e6:.1f} MB down"
    refused = f", {len(record.refused)} refused" if record.refused else ""
    return f"{seconds:5.0f} s  round {record.round}/{rounds}: {told}{refused}"


def _who(record: RoundRecord) -> str:
    """A small cohort by name and rank, a large one as clients per rank."""
    ranks = {c: (max(row["ranks"]), min(row["ranks"])) for c, row in record.clients.items()}
    told = {r: f"r{r[0]}" if r[0] == r[1] else f"r{r[1]}-{r[0]}" for r in ranks.values()}
    if len(ranks) <= NAMED:
        return ", ".join(f"{c} {told[r]}" for c, r in ranks.items())
    return ", ".join(f"{n} {told[r]}" for r, n in sorted(Counter(ranks.values()).items()))


def evaluation_line(line: Mapping[str, Any]) -> str:
    """One line for one evaluation."""
    what = "the base model" if line["round"] == 0 else f"after round {line['round']}"
    own = ", each client at its own rank" if line["view"] == "own" else ""
    cells = []
    for group in ("seen", "unseen"):
        means = line.get(group, {}).get("mean", {})  # empty where nobody was asked
        numbers = ", ".join(f"{LABELS[m]} {means[m]:.3f}" for m in LABELS if m in means)
        if numbers:
            cells.append(f"{group}: {numbers}")
    return f"         {what}{own} ({line['split']}): " + "; ".join(cells)
