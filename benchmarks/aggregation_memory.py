"""How much memory and time does the server need for LLaMA-3-8B, as the cohort grows?

    python benchmarks/aggregation_memory.py              # cohorts of 20, 80 and 160
    OMP_NUM_THREADS=1 python benchmarks/aggregation_memory.py   # CPU seconds: for a busy machine

One decoder layer (all seven modules), heavy-tail-light, updates as bfloat16 safetensors on disk,
read one module at a time; every cohort three times, each in a process of its own. Prints the least
seconds, the largest anonymous resident memory (pages of the files themselves can be dropped by the
system at any time), and the round of 32 layers that follows from it; last one JSON line.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path

import torch

from flexlora.federation.spool import Spool
from flexlora.federation.state import Update, iterate
from flexlora.lowrank import LowRank, decompose

LAYERS = 32
TIMES = 3
"""Runs of each cohort: a peak of milliseconds can lie between two samples."""

MODULES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
TYPES = {(8, 8): 0.80, (30, 30): 0.05, (30, 200): 0.05, (200, 200): 0.10}
"""Rank in attention and in the MLP -> share of the clients: the paper's heavy-tail-light."""


def ranks(cohort: int) -> list[tuple[int, int]]:
    """Attention and MLP rank of each client."""
    return [pair for pair, share in TYPES.items() for _ in range(round(share * cohort))]


def signal(shape: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A common matrix of rank 200 with singular values `1 / j`, both factors balanced."""
    g = torch.Generator().manual_seed(seed)
    root = torch.arange(1.0, 201) ** -0.5
    B = torch.linalg.qr(torch.randn(shape[0], 200, generator=g))[0] * root
    A = torch.linalg.qr(torch.randn(shape[1], 200, generator=g))[0] * root
    return B, A.T.contiguous()


def fill(spool: Spool, cohort: int) -> int:
    """Write the cohort's updates, client by client; returns their bytes."""
    common = {m: signal(shape, i) for i, (m, shape) in enumerate(MODULES.items())}
    g, written = torch.Generator().manual_seed(0), 0

    def noisy(X: torch.Tensor) -> torch.Tensor:
        noise = 0.5 * X.norm() / X.numel() ** 0.5
        return (X + noise * torch.randn(X.shape, generator=g)).bfloat16()

    for k, (attention, mlp) in enumerate(ranks(cohort)):
        adapter = {}
        for module, (B, A) in common.items():
            r = mlp if module.startswith("mlp") else attention
            adapter[module] = LowRank(noisy(B[:, :r]), noisy(A[:r]), 16 / r)
        written += sum(d.B.nbytes + d.A.nbytes for d in adapter.values())
        spool.add(Update(f"client-{k:05d}", 1, "base", adapter, 100))
    return written


def anonymous_bytes() -> int:
    """`RssAnon` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status; this benchmark needs Linux.")


class Peak:
    """Largest anonymous resident memory while the context is open, sampled every 5 ms."""

    def __enter__(self) -> Peak:
        self.before, self.bytes, self.done = anonymous_bytes(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        """Until the context closes."""
        while not self.done.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def measure(cohort: int) -> dict[str, object]:
    """Aggregate one layer."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as folder, Spool(0, Path(folder)) as spool:
        written = fill(spool, cohort)
        ctypes.CDLL(None).malloc_trim(0)  # what filling left behind is not the server's
        rows, G = [], {}
        with Peak() as peak:
            start = clock()
            for module, terms in iterate(spool):
                rank = max(t.rank for t in terms)
                begin = clock()
                found = decompose(terms, spool.weights, rank)
                G[module] = found.product
                rows.append(
                    {
                        "module": module,
                        "sum_ranks": sum(t.rank for t in terms),
                        "path": found.quality.path,
                        "seconds": round(clock() - begin, 2),
                        "estimated_excess": round(found.quality.excess, 5),
                    }
                )
            seconds = clock() - start
    return {
        "cohort": cohort,
        "update_gigabytes": round(written / 1e9, 3),
        "seconds_per_layer": round(seconds, 2),
        "minutes_per_round": round(seconds * LAYERS / 60, 2),
        "anonymous_before_mb": round(peak.before / 1e6),
        "anonymous_peak_mb": round(peak.bytes / 1e6),
        "result_mb": round(sum(d.B.nbytes + d.A.nbytes for d in G.values()) / 1e6),
        "modules": rows,
    }


def main() -> None:
    """One line per cohort, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohorts", type=int, nargs="+", default=[20, 80, 160])
    args = parser.parse_args()
    results = []
    for cohort in args.cohorts:
        runs = []
        for _ in range(TIMES):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                runs.append(pool.apply(measure, (cohort,)))
        result = min(runs, key=lambda r: r["seconds_per_layer"])
        result["anonymous_peak_mb"] = max(r["anonymous_peak_mb"] for r in runs)
        results.append(result)
        for row in result["modules"]:
            print("   ", *row.values())
        print({k: v for k, v in result.items() if k != "modules"}, flush=True)
    peaks = [r["anonymous_peak_mb"] for r in results]
    print(
        json.dumps(
            {
                "threads": torch.get_num_threads(),
                "layers": LAYERS,
                "cohorts": results,
                "peak_growth": round(max(peaks) / min(peaks) - 1, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
