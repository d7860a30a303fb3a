"""Is training many clients on one base faster than one PEFT model and one Trainer per client?

    python benchmarks/simulation.py --quick                 # minutes on two cores
    python benchmarks/simulation.py --data clients.parquet  # Natural Instructions' own lengths

Both sides train the same 16 clients on the same examples in the same order, with the same ranks,
initial factors, AdamW and clipping, from the same base object: ours together, the other way one
client after another (a PEFT model, transformers' Trainer, padding to the longest of a micro-batch).
First the float32 factors are compared, then times are printed. Tokens are the examples' own,
padding excluded, on both sides; ours computes what examples of a client have in common at the start
once, and counts it each time. On a busy machine look at the ratio of CPU times, with
OMP_NUM_THREADS=1: threads that wait for each other spin. The last line of stdout is one JSON
object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments

from flexlora.adapter import LoraSpec, initial_adapter
from flexlora.data.load import load_population
from flexlora.data.templates import AnswerTooLong, Tokens, encode
from flexlora.federation.state import Client, Payload, Update
from flexlora.lowrank import LowRank
from flexlora.training.batch import collate, packed
from flexlora.training.client import Job, LocalTraining, Progress, data_order, train
from flexlora.training.models import Base, load_base

RANKS = (4, 4, 8, 32)
SEED, ROUND, LIMIT = 0, 1, 512


@dataclass(frozen=True)
class Measured:
    """One way of doing the work."""

    seconds: float
    cpu_seconds: float
    tokens: int
    memory: int
    adapters: dict[str, dict[str, LowRank]]
    loss: float

    @property
    def speed(self) -> float:
        """Real tokens a second."""
        return self.tokens / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 step a client instead of 4")
    parser.add_argument("--data", help="parquet of Natural Instructions; default: reasoning-gym")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    training = LocalTraining(
        per_device_train_batch_size=2, max_steps=options.steps or (1 if options.quick else 4)
    )
    exact = load_base("smollm2-135m-instruct", "float32", options.device)
    jobs = work(exact, options.clients, training, options.data)
    print(f"{len(jobs)} clients, ranks {RANKS}, {training.max_steps} steps of 2 examples")
    peer = measured(lambda: theirs(exact, jobs, training), exact)
    ours32 = measured(lambda: list(train(exact, jobs, training, SEED)), exact)
    gap = distance(ours32.adapters, peer.adapters)
    assert gap < 1e-3, f"float32 adapters differ by {gap:.1e} relative; expected below 1e-3"
    one = measured(lambda: list(train(exact, jobs[-1:], training, SEED)), exact)
    del exact
    gc.collect()
    base = load_base("smollm2-135m-instruct", "auto", options.device)
    phases: dict[str, float] = {}

    def on_step(progress: Progress) -> None:
        for name, seconds in progress.phases.items():
            phases[name] = phases.get(name, 0.0) + seconds

    ours = measured(lambda: list(train(base, jobs, training, SEED, on_step)), base)
    report(peer, ours, ours32, one, base, jobs, training, gap, phases)


def work(base: Base, clients: int, training: LocalTraining, path: str | None) -> list[Job]:
    """Clients with real tasks, spread over the data, and their initial adapters."""
    wanted = training.max_steps * training.batch_size
    if path:
        population = load_population("parquet", path=path, empty_answers="drop")
    else:
        population = load_population("reasoning-gym", train=wanted, eval=0, test=0)
    ids = sorted(population)
    jobs = []
    for n in range(clients):
        id, rank = ids[n * len(ids) // clients], RANKS[n % len(RANKS)]
        tokens: list[Tokens] = []
        for example in population[id].load("train"):
            try:
                tokens.append(encode(example, base.tokenizer, "alpaca", LIMIT))
            except AnswerTooLong:
                continue
            if len(tokens) == wanted:
                break
        spec = LoraSpec(rank, lora_alpha=16)
        start = initial_adapter(base.shapes, dict.fromkeys(base.shapes, rank), n)
        adapter = {m: LowRank(d.B, d.A, spec.scaling(m)) for m, d in start.items()}
        payload = Payload(id, ROUND, base.fingerprint, adapter)
        jobs.append(Job(Client(id, spec, len(tokens)), payload, lambda tokens=tokens: tokens))
    return jobs


def theirs(base: Base, jobs: Sequence[Job], training: LocalTraining) -> list[Update]:
    """One PEFT model and one Trainer per client, one after another, on the same base object."""
    before = base.model.config._attn_implementation
    base.model.set_attn_implementation("sdpa")
    updates = [alone(base, job, training) for job in jobs]
    base.model.set_attn_implementation(before)
    return updates


def alone(base: Base, job: Job, training: LocalTraining) -> Update:
    examples, spec, adapter = job.load(), job.client.lora, job.payload.adapter
    order = data_order(
        len(examples), training.draws(len(examples)), SEED, ROUND, job.client.id, "order"
    )
    config = LoraConfig(
        r=spec.r, lora_alpha=spec.lora_alpha, target_modules=list(adapter), lora_dropout=0.0
    )
    model = get_peft_model(base.model, config)
    factors = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            module, factor = name.removeprefix("base_model.model.").split(".lora_")
            factors[module, factor[0]] = parameter
            parameter.data.copy_(getattr(adapter[module], factor[0]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Ordered(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=training.per_device_train_batch_size,
                max_steps=training.max_steps,
                learning_rate=training.learning_rate,
                lr_scheduler_type="constant",
                optim="adamw_torch",
                weight_decay=0.0,
                max_grad_norm=training.max_grad_norm,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=base.device.type == "cpu",
                dataloader_pin_memory=False,
            ),
            train_dataset=[examples[i] for i in order],
            data_collator=lambda rows: padded(rows, base.tokenizer.pad_token_id),
        )
        trainer.remove_callback(PrinterCallback)
        result = trainer.train()
    trained = {
        m: LowRank(
            factors[m, "B"].detach().cpu().clone(), factors[m, "A"].detach().cpu().clone(),
            spec.scaling(m),
        )
        for m in adapter
    }  # fmt: skip
    model.unload()
    metrics = {
        "tokens": float(sum(len(examples[i].ids) for i in order)),
        "loss": result.training_loss,
    }
    return Update(job.client.id, ROUND, base.fingerprint, trained, len(examples), metrics)


class Ordered(Trainer):
    """Takes the examples as they come: their order is already drawn."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def padded(rows: Sequence[Tokens], pad: int) -> dict[str, torch.Tensor]:
    """As `DataCollatorForSeq2Seq` does: to the longest, labels of the prompt masked."""
    longest = max(len(t.ids) for t in rows)
    ids, labels, mask = [], [], []
    for t in rows:
        room = longest - len(t.ids)
        ids.append([*t.ids, *[pad] * room])
        labels.append([*[-100] * t.labels_from, *t.ids[t.labels_from :], *[-100] * room])
        mask.append([1] * len(t.ids) + [0] * room)
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask),
    }


def measured(action: Callable[[], Sequence[Update]], base: Base) -> Measured:
    """Run it; time, and the most memory it took above what was there before."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before does not hide what is used
    peak = Peak(base)
    began, worked = time.perf_counter(), time.process_time()
    with peak:
        updates = action()
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    tokens = int(sum(u.metrics["tokens"] for u in updates))
    loss = sum(u.metrics["loss"] for u in updates) / len(updates)
    adapters = {u.client: dict(u.adapter) for u in updates}
    print(f"  {seconds:.1f} s, {tokens} tokens, mean loss {loss:.4f}", flush=True)
    return Measured(seconds, worked, tokens, peak.bytes, adapters, loss)


class Peak:
    """The most memory while open, above what was in use at its start."""

    def __init__(self, base: Base) -> None:
        self.device, self.bytes = base.device, 0

    def __enter__(self) -> None:
        self._done, self._before = threading.Event(), psutil.Process().memory_info().rss
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, psutil.Process().memory_info().rss - self._before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before


def distance(mine: dict[str, dict[str, LowRank]], other: dict[str, dict[str, LowRank]]) -> float:
    """Largest relative Frobenius distance of a client's factors, all modules together."""
    worst = 0.0
    for client in mine:
        for factor in "AB":
            pairs = [
                (getattr(d, factor).cpu(), getattr(other[client][m], factor))
                for m, d in mine[client].items()
            ]
            gap = sum(float((x - y).square().sum()) for x, y in pairs)
            worst = max(worst, (gap / sum(float(y.square().sum()) for _, y in pairs)) ** 0.5)
    return worst


def shares(base: Base, jobs: Sequence[Job], training: LocalTraining) -> tuple[float, float]:
    """Of one step's attention slots: padding; of its real tokens: computed once for several."""
    items = [(n, t) for n, job in enumerate(jobs) for t in job.load()[: training.batch_size]]
    real = computed = slots = 0
    for chunk in packed(items, 2048):
        batch = collate(base, chunk)
        real += sum(batch.lengths)
        computed += batch.inputs["input_ids"].numel()
        slots += batch.inputs["segments"].padded if base.flat else computed
    return 1 - real / slots, 1 - computed / real


def report(
    peer: Measured,
    ours: Measured,
    ours32: Measured,
    one: Measured,
    base: Base,
    jobs: Sequence[Job],
    training: LocalTraining,
    gap: float,
    phases: dict[str, float],
) -> None:
    padding, shared = shares(base, jobs, training)
    numbers = sum(d.B.numel() + d.A.numel() for j in jobs for d in j.payload.adapter.values())
    rows = [
        ("PEFT + Trainer, float32", peer),
        ("together, float32", ours32),
        (f"together, {str(base.dtype).removeprefix('torch.')} base", ours),
    ]
    head = f"{'tokens/s':>10}{'speedup':>9}{'in CPU time':>13}{'peak above base':>17}{'loss':>9}"
    print(f"\n{'':32}{head}")
    for name, m in rows:
        wall, work = m.speed / peer.speed, peer.cpu_seconds / m.cpu_seconds
        memory = f"{m.memory / 1e6:14.0f} MB"
        print(f"{name:32}{m.speed:10.0f}{wall:9.2f}{work:13.2f}{memory}{m.loss:9.4f}")
    print(f"one client alone, float32: peak {one.memory / 1e6:.0f} MB above the base")
    print(f"factors, gradients and moments of all: {16 * numbers / 1e6:.0f} MB")
    print(f"float32 adapters differ by at most {gap:.1e} relative")
    total = sum(phases.values())
    print(", ".join(f"{name} {seconds / total:.0%}" for name, seconds in phases.items()))
    result = {
        "tokens_per_second": ours.speed,
        "peer_tokens_per_second": peer.speed,
        "speedup": ours.speed / peer.speed,
        "speedup_float32": ours32.speed / peer.speed,
        "speedup_cpu_time": peer.cpu_seconds / ours.cpu_seconds,
        "speedup_float32_cpu_time": peer.cpu_seconds / ours32.cpu_seconds,
        "padding_share": padding,
        "shared_share": shared,
        "peak_memory_bytes": ours.memory,
        "peak_memory_bytes_float32": ours32.memory,
        "one_client_memory_bytes": one.memory,
        "peer_peak_memory_bytes": peer.memory,
        "adapter_distance": gap,
        "clients": len(jobs),
        "tokens": ours.tokens,
        "dtype": str(base.dtype),
        "threads": torch.get_num_threads(),
        "phases": phases,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
