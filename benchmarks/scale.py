"""How does a round's cost grow with the population and with the cohort?

    python benchmarks/scale.py           # about two minutes on two cores
    python benchmarks/scale.py --draw    # only draw docs/images/scale.svg again

FlexLoRA on a random Llama of two layers, clients at ranks 2 to 8, two steps of two examples each. A
registry makes a client's text when it is asked for, as the loaders do. Prints a table; writes
docs/images/scale.json and docs/images/scale.svg; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny

from flexlora.adapter import LoraSpec, initial_adapter
from flexlora.data.task import Example, Split, Task
from flexlora.engines.embedded import Embedded, Prompting
from flexlora.experiment.checkpoints import Progress, save_checkpoint
from flexlora.federation.run import Schedule, run
from flexlora.federation.spool import Spool
from flexlora.federation.state import Client, ServerState
from flexlora.methods import make
from flexlora.training.client import LocalTraining
from flexlora.training.models import Base, as_base

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "scale.svg"
POPULATIONS = (1_000, 3_000, 10_000, 30_000, 100_000)
COHORTS = (8, 16, 32, 64, 128)
SPECS = tuple(LoraSpec(r, lora_alpha=8) for r in (2, 2, 4, 8))
ROUNDS = 3


class Registry(Mapping[str, Task]):
    """So many clients; each is made when asked for."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __getitem__(self, id: str) -> Task:
        def load(split: Split) -> list[Example]:
            n = int(id)
            return [Example(f"add {n} and {k}", "", str(n + k)) for k in range(4)]

        return Task(id, "sum", "arithmetic", {"train": 4, "eval": 0, "test": 0}, load)

    def __iter__(self) -> Iterator[str]:
        return (f"{n:06d}" for n in range(self._size))

    def __len__(self) -> int:
        return self._size


@dataclass(frozen=True)
class Cost:
    """Of one federation: seconds, and bytes above those of the base model."""

    population: int
    cohort: int
    start_seconds: float
    round_seconds: float
    sampling_seconds: float
    checkpoint_seconds: float
    checkpoint_bytes: int
    memory_bytes: int


def cost(base: Base, population: int, cohort: int, rounds: int = ROUNDS) -> Cost:
    """Start a federation and run a few rounds; the first warms up and is not counted."""
    memory = psutil.Process().memory_info().rss
    began = time.perf_counter()
    registry = Registry(population)
    clients = [Client(id, SPECS[n % len(SPECS)], 4) for n, id in enumerate(registry)]
    ranks = dict.fromkeys(base.shapes, 8)
    state = ServerState(0, base.fingerprint, initial_adapter(base.shapes, ranks, 0))
    spool = Path(tempfile.gettempdir()) / "flexlora-scale-spool"
    training = LocalTraining(per_device_train_batch_size=2, max_steps=2)
    engine = Embedded(base, registry, training, prompting=Prompting(max_length=128))
    rounds_of = run(
        make("flexlora"),
        state,
        clients,
        engine,
        Schedule(rounds + 1, cohort),
        Spool(1 << 30, spool),
    )
    started = time.perf_counter() - began
    next(rounds_of)
    memory = psutil.Process().memory_info().rss - memory
    began = time.perf_counter()
    records = list(rounds_of)
    seconds = (time.perf_counter() - began) / rounds
    recorded = sum(sum(r.seconds.values()) for _, r in records) / rounds
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        saved = save_checkpoint(Path(folder), records[-1][0], Progress())
        writing = time.perf_counter() - began
        size = sum(p.stat().st_size for p in saved.iterdir())
    return Cost(
        population, cohort, started, seconds, seconds - recorded, writing, size, max(memory, 0)
    )


def draw(found: dict[str, list[dict[str, float]]]) -> None:
    """Seconds of a round against population and cohort."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    for axis, name in zip(axes, ("population", "cohort"), strict=True):
        x = [row[name] for row in found[name]]
        axis.plot(x, [row["round_seconds"] for row in found[name]], "o-", label="a round")
        axis.plot(x, [row["sampling_seconds"] for row in found[name]], "s--", label="sampling")
        axis.set_xscale("log" if name == "population" else "linear")
        axis.set_xlabel(f"{name}, clients")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(IMAGE, metadata={"Date": None})


def main() -> None:
    numbers = IMAGE.with_suffix(".json")
    if "--draw" in sys.argv:
        draw(json.loads(numbers.read_text()))
        return
    base = as_base(tiny.model(dtype=torch.float32), tiny.tokenizer(), "tiny")
    cost(base, 100, 8)  # warm up
    found = {
        "population": [vars(cost(base, n, 16)) for n in POPULATIONS],
        "cohort": [vars(cost(base, 1_000, n)) for n in COHORTS],
    }
    columns = list(found["cohort"][0])
    print("".join(f"{name.replace('_', ' '):>20}" for name in columns))
    for row in (*found["population"], *found["cohort"]):
        print("".join(f"{row[name]:20.4g}" for name in columns))
    numbers.write_text(json.dumps(found, indent=1) + "\n")
    draw(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
