"""Do the error estimates hold on really trained adapters?

    python benchmarks/aggregation_trained.py     # two minutes on two cores

Two rounds of FlexLoRA on SmolLM2-135M: 16 clients of reasoning-gym, 12 a round, ranks 8, 32 and 64,
three steps each. Every module's sum of the second round is factorised by the iterative paths, with
and without bfloat16 products (the same where the CPU has no units for them), and compared with an
SVD in float64. Prints the worst of all modules; last one JSON line.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

import flexlora as fl
from flexlora.federation.state import ServerState, Updates, iterate
from flexlora.lowrank import Options, decompose

FAMILIES = [
    "basic_arithmetic", "chain_sum", "coin_flip", "count_bits", "decimal_arithmetic", "gcd", "lcm",
    "leg_counting", "letter_counting", "number_sorting", "prime_factorization", "products",
    "simple_equations", "spell_backward", "syllogism", "word_sorting",
]  # fmt: skip
RANKS = [8] * 9 + [32] * 4 + [64] * 3
WAYS = {
    "krylov": Options(path="krylov"),
    "dense-krylov": Options(path="dense-krylov", fast_products=False),
    "dense-krylov, fast": Options(path="dense-krylov"),
}


def compare(updates: Updates) -> Iterator[dict[str, object]]:
    """Every module, way and rank: what was wrong and what was told."""
    for module, terms in iterate(updates):
        weights = updates.weights
        D = sum(w * t.to(torch.float64).dense() for w, t in zip(weights, terms, strict=True))
        S = torch.linalg.svdvals(D)
        for rank in (8, 64):
            for way, options in WAYS.items():
                found = decompose(terms, weights, rank, options=options)
                wrong = 1 - found.product.B.norm(dim=0).double() / S[:rank]
                yield {
                    "module": module,
                    "rank": rank,
                    "way": way,
                    "excess": float((D - found.product.dense()).norm() / S[rank:].norm()) - 1,
                    "told": found.quality.excess,
                    "sigma": float(wrong.abs().max()),
                    "sigma_told": float(found.quality.sigma_error.max()),
                }


def main() -> None:
    """Train, compare, print."""
    base = fl.load_base("smollm2-135m-instruct")
    tasks = fl.load_population("reasoning-gym", families=FAMILIES, train=16)
    ranks = fl.assign(sorted(tasks), RANKS, seed=0)
    clients = [fl.Client(c, fl.LoraSpec(r), tasks[c].sizes["train"]) for c, r in ranks.items()]
    method = fl.make("flexlora")
    engine = fl.Embedded(base, tasks, fl.LocalTraining(learning_rate=2e-3, max_steps=3))
    rows: list[dict[str, object]] = []

    def watched(state: ServerState, updates: Updates) -> ServerState:
        if state.round == 1:
            rows.extend(compare(updates))
        return method.aggregate(state, updates)

    state = method.start(fl.initial_state(base.fingerprint, base.shapes, clients))
    rounds, watching = fl.Schedule(rounds=2, cohort_size=12), replace(method, aggregate=watched)
    with tempfile.TemporaryDirectory() as folder, fl.Spool(1 << 30, Path(folder)) as spool:
        for after, record in fl.run(watching, state, clients, engine, rounds, spool):
            print(f"round {after.round}: training loss {record.metrics['loss']:.3f}", flush=True)
    summary = []
    for way in WAYS:
        for rank in (8, 64):
            these = [r for r in rows if r["way"] == way and r["rank"] == rank]
            worst = {
                k: round(max(float(str(r[k])) for r in these), 5)
                for k in ("excess", "told", "sigma", "sigma_told")
            }
            over = sum(float(str(r["excess"])) > float(str(r["told"])) + 1e-4 for r in these)
            summary.append({"way": way, "rank": rank, **worst, "underestimated": over})
            print(*summary[-1].values(), sep="\t")
    print(json.dumps({"modules": len(rows) // len(summary), "worst": summary}))


if __name__ == "__main__":
    main()
