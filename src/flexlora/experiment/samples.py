"""A few answers in full, before and after: what a number cannot show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from flexlora.experiment import runs

Sample = Mapping[str, str]
"""`client`, `question`, `reference`, `answer`."""


def write_samples(folder: Path, before: Sequence[Sample], after: Sequence[Sample] = ()) -> None:
    """Keep them in a run directory as `samples.json`."""
    text = json.dumps({"before": list(before), "after": list(after)}, indent=2, ensure_ascii=False)
    runs.write(folder / "samples.json", text)


def read_samples(folder: Path) -> list[Sample]:
    """The base model's answers."""
    return list(runs.read(folder / "samples.json")["before"])


def describe_samples(before: Sequence[Sample], after: Sequence[Sample] = ()) -> str:
    """Questions with their answers in full."""
    later = {s["client"]: s["answer"] for s in after}
    blocks = []
    for s in before:
        block = [f"[{s['client']}] {s['question']}", f"  expected: {s['reference']}"]
        block.append(f"  base:     {s['answer']}")
        if s["client"] in later:
            block.append(f"  trained:  {later[s['client']]}")
        blocks.append("\n".join(block))
    return "\n\n".join(blocks)
