"""python benchmarks/methods.py collapse|heterogeneity|curves [--out FOLDER]

What two cores can show about the methods: that each learns, what becomes of the tail, and how task
heterogeneity moves the loss. Not which method is better. Every piece goes on where it was stopped.

collapse        FlexLoRA, raFLoRA and server memory over 300 rounds on a tiny linear model, cohort
                size {4, 16} x owners of the largest rank {5 %, 25 %}; against the prediction from
                q_j of the cohorts that were really drawn. Also without training, where it is exact.
heterogeneity   the real 135M model on one pooled data set dealt iid, by category, by task; two
                methods, one seed.
curves          flexlora compare compare-methods-cpu: every method's loss curve, one seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path

import torch

from flexlora.adapter import LoraSpec, initial_adapter, stable_seed
from flexlora.federation.round import Rules
from flexlora.federation.run import Schedule, run
from flexlora.federation.sampling import cohort
from flexlora.federation.spool import Spool
from flexlora.federation.state import Client, Payload, ServerState, Update
from flexlora.federation.telemetry import singular_values
from flexlora.lowrank import LowRank
from flexlora.methods import make

UNTRAINED = "flexlora without training (q)"
METHODS = ("flexlora", "raflora", "flexlora-memory")
LAYER, SHAPE = "layer", (48, 40)
CLIENTS, SMALL, LARGE, ROUNDS = 40, 4, 16, 300


@dataclass(frozen=True)
class Linear:
    """Clients that pull one weight towards targets of their own: a common part, and a private one.

    Attributes:
        steps: gradient steps a round; 0 sends back what came.
    """

    steps: int
    rate: float = 0.05

    def train(self, payloads: Sequence[Payload], clients: Mapping[str, Client]) -> Iterator[Update]:
        """Plain gradient descent on `1/2 ||s B A - T_k||^2`."""
        for payload in payloads:
            d = payload.adapter[LAYER]
            T, B, A = target(payload.client), d.B.clone(), d.A.clone()
            for _ in range(self.steps):
                gap = d.scaling * B @ A - T
                B, A = B - self.rate * gap @ A.T, A - self.rate * B.T @ gap
            loss = float(((d.scaling * B @ A - T) ** 2).mean())
            adapter = {LAYER: LowRank(B, A, d.scaling)}
            yield Update(payload.client, payload.round, "tiny", adapter, 1, {"loss": loss})


def target(client: str) -> torch.Tensor:
    """A common matrix of slowly falling spectrum, plus a private one of a tenth of its size."""
    return common() + 0.3 * _normal("private", client, SHAPE) / sqrt(SHAPE[0])


def common() -> torch.Tensor:
    """What all clients' targets share: singular values `3 / sqrt(j)`."""
    U, V = (
        torch.linalg.qr(_normal("basis", s, (n, 40))).Q for s, n in zip("UV", SHAPE, strict=True)
    )
    return 3 * (U * torch.arange(1, 41) ** -0.5) @ V.T


def _normal(kind: str, name: str, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(stable_seed(kind, name)))


def people(share: float) -> list[Client]:
    """Equal weights; the first of them own the large rank."""
    owners = round(share * CLIENTS)
    ranks = [LARGE if i < owners else SMALL for i in range(CLIENTS)]
    return [Client(f"c{i:02}", LoraSpec(r, r), 1) for i, r in enumerate(ranks)]


def collapse(size: int, share: float, name: str, steps: int) -> tuple[list[float], float]:
    """Energy beyond the small rank after every round, and the last distance to `common`."""
    clients, method = people(share), make(name)
    G = initial_adapter({LAYER: SHAPE}, {LAYER: LARGE}, 0)
    if not steps:  # something to lose: sixteen equal directions, a fourth of the energy in the head
        U, V = (
            torch.linalg.qr(_normal("start", s, (n, LARGE))).Q
            for s, n in zip("UV", SHAPE, strict=True)
        )
        S = torch.linspace(1.01, 0.99, LARGE)
        G = {LAYER: LowRank(U * S, V.T.contiguous())}
    state = ServerState(0, "tiny", G)
    schedule, spool = Schedule(ROUNDS, size), Spool(1 << 30, Path("unused"))
    told = []
    rules, error = Rules(cosines=False), 0.0
    for after, _ in run(
        method, method.start(state), clients, Linear(steps), schedule, spool, rules
    ):
        energy = singular_values(after.G[LAYER]).double() ** 2
        told.append(float(energy[SMALL:].sum() / energy.sum()) if energy.sum() else 0.0)
        error = float((after.G[LAYER].dense() - common()).norm() / common().norm())
    return told, error


def shares(size: int, share: float) -> list[float]:
    """`q` of the large rank in every round's cohort: the owners' share of it."""
    owners = {c.id for c in people(share) if c.lora.r == LARGE}
    ids = [c.id for c in people(share)]
    return [len(owners & set(cohort(0, n, ids, size))) / size for n in range(1, ROUNDS + 1)]


def predicted(size: int, share: float) -> list[float]:
    """The flat tail under FlexLoRA without training: direction j keeps q_j of each cohort."""
    kept, told = 1.0, []
    S = torch.linspace(1.01, 0.99, LARGE).double() ** 2
    head, tail = float(S[:SMALL].sum()), float(S[SMALL:].sum())
    for q in shares(size, share):
        kept *= q * q
        told.append(tail * kept / (head + tail * kept))
    return told


def collapse_piece(out: Path) -> dict[str, object]:
    """All curves; the no-training ones asserted equal to the prediction."""
    curves: dict[str, list[float]] = {}
    rows = []
    for size in (4, 16):
        for share in (0.05, 0.25):
            q, where = predicted(size, share), f"cohort {size}, owners {share:.0%}"
            still, _ = collapse(size, share, "flexlora", 0)
            worst = max(abs(a - b) for a, b in zip(still, q, strict=True))
            assert worst < 1e-4, f"{where}: q_j and the method differ by {worst}"
            kept, _ = collapse(size, share, "flexlora-memory", 0)
            assert abs(kept[-1] - kept[0]) < 1e-3, f"{where}: server memory lost {kept}"
            told = {name: collapse(size, share, name, 5) for name in METHODS}
            curves |= {f"{where}, {name}": curve for name, (curve, _) in told.items()}
            curves[f"{where}, {UNTRAINED}"] = q
            tails = [sum(told[name][0][-50:]) / 50 for name in METHODS]
            errors = [told[name][1] for name in METHODS]
            alone = sum(found == 0 for found in shares(size, share)) / ROUNDS
            gone = next((n for n, v in enumerate(q, 1) if v < 1e-4), 0)
            rows.append([where, alone, gone, *tails, *errors])
    columns = [f"{what}, {m}" for what in ("tail", "error") for m in METHODS]
    print_table(["", "rounds without an owner", "untrained tail below 1e-4", *columns], rows)
    plot(curves, out / "collapse.svg")
    return {"worst": worst, "rows": rows}


def plot(curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """One panel per federation, one line per method, and what no training would leave."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "flexlora", "svg.fonttype": "none"}
    styles = {
        "flexlora": ("#0072B2", "-"),
        "raflora": ("#D55E00", "--"),
        "flexlora-memory": ("#009E73", "-."),
        UNTRAINED: ("#555555", ":"),
    }
    places = list(dict.fromkeys(name.rpartition(", ")[0] for name in curves))
    figure, panels = plt.subplots(
        2, 2, figsize=(8, 5.6), sharex=True, sharey=True, layout="constrained"
    )
    for panel, place in zip(panels.flat, places, strict=True):
        for name, (colour, style) in styles.items():
            points = [max(v, 1e-7) for v in curves[f"{place}, {name}"]]
            rounds = range(1, len(points) + 1)
            panel.plot(rounds, points, style, color=colour, lw=1.2, label=name)
        panel.set(title=place, yscale="log")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[1]:
        panel.set_xlabel("round")
    for panel in panels[:, 0]:
        panel.set_ylabel(f"share of energy beyond rank {SMALL}")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def heterogeneity_piece(out: Path) -> dict[str, object]:
    """Runs that differ in who holds which rows, and in the method; nothing else.

    The base's own loss differs a little between partitions, being a mean over clients of means over
    tokens: read what was removed.
    """
    from flexlora.data.reasoning import reasoning_gym_population
    from flexlora.experiment.console import Console
    from flexlora.experiment.load import validate
    from flexlora.experiment.run import proceed, start
    from flexlora.experiment.runs import read

    table = out / "pooled.jsonl"
    if not table.exists():
        population = reasoning_gym_population(train=32, eval=2, test=4)
        lines = [
            {"task": t.task, "category": t.category or "none", "split": split,
             "instruction": e.instruction, "input": e.input, "output": e.output}
            for t in population.values()
            for split in ("train", "eval", "test")
            for e in t.load(split)
        ]  # fmt: skip
        table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    partitions = {
        "iid": {"by": "iid", "clients": 24},
        "category": {
            "by": "dirichlet",
            "column": "category",
            "clients": 24,
            "alpha": 0.3,
            "min_rows": 4,
        },
        "task": {"by": "column", "column": "task"},
    }
    rows = []
    for name, partition in partitions.items():
        for method in ("flexlora", "flexlora-memory"):
            folder = out / f"{name}-{method}"
            config = validate({
                "data": {"kind": "jsonl", "path": str(table), "partition": partition},
                "lora": {"r": "heavy-tail-light", "types": [4, 8, 16, 32],
                         "target_modules": ["q_proj", "v_proj"]},
                "method": {"name": method},
                "training": {"max_steps": 3, "max_length": 160},
                "federation": {"rounds": 4, "clients_per_round": 4},
                "evaluation": {"every": 0, "metrics": ["loss"], "samples": 0},
                "output_dir": str(folder),
            })  # fmt: skip
            go = partial(proceed, folder) if folder.exists() else partial(start, config, "h")
            with Console(sys.stderr) as console:
                go(console)
            lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
            test = [
                m["seen"]["weighted"]["loss"]
                for m in lines
                if m["kind"] == "evaluation" and m["view"] == "global" and m["split"] == "test"
            ]
            cosines = [row["cosine"] for m in lines if m["kind"] == "round"
                       for row in m["clients"].values()]  # fmt: skip
            seconds = read(folder / "summary.json")["seconds"]
            rows.append([name, method, test[0], test[-1], sum(cosines) / len(cosines), seconds])
    print_table(["dealt", "method", "loss before", "loss after", "cosine to the mean", "s"], rows)
    return {"rows": rows}


def curves_piece(out: Path) -> dict[str, object]:
    """The comparison of one seed, and its table."""
    from flexlora.experiment.compare.grid import load_comparison
    from flexlora.experiment.compare.run import compare
    from flexlora.experiment.console import Console
    from flexlora.experiment.report.page import write_report

    folder = out / "methods"
    with Console(sys.stderr) as console:
        found = compare(load_comparison("compare-methods-cpu"), folder, console)
    write_report(folder)
    print((folder / "comparison.md").read_text())
    return {"arms": {row["arm"]: row["means"]["global"] for row in found["arms"]}}


def print_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """As Markdown."""
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row) + " |")


PIECES = {"collapse": collapse_piece, "heterogeneity": heterogeneity_piece, "curves": curves_piece}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("piece", choices=PIECES)
    parser.add_argument("--out", type=Path, default=Path("results/methods"))
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    print(json.dumps(PIECES[words.piece](words.out)))


if __name__ == "__main__":
    main()
