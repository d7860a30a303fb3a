"""What a run will take in seconds and bytes: estimated, before any weight is loaded.

Seconds are FLOPs over the speed of a matrix product on this machine, measured on the spot, times
the share of that speed reached by the quickstart recipe (SmolLM2-135M, bfloat16, two CPU cores).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from flexlora.data.task import Split
from flexlora.data.templates import AnswerTooLong, encode
from flexlora.experiment.build import Experiment
from flexlora.lowrank.cost import choose, cost
from flexlora.training.batch import label_count
from flexlora.training.memory import Size, auto_clients, auto_tokens, free_on, peak_bytes
from flexlora.training.models import Outline, tokenizer_of

TRAINING, SCORING, WRITING = 0.75, 1.5, 0.08
"""Of the product's speed: training at 4 FLOP per token and parameter; a forward at 2 (above 1:
clients that share a model share beginnings of examples too, and embeddings cost nothing);
generation at 2 per token written. Measured alone on the machine, 2026-11-21, at 389 GFLOP/s: 545
tokens/s in training; 2,430 tokens/s scored under one model, fewer under each client's own."""

SERVER = 2.0
"""Admission, aggregation and telemetry of a round, in aggregations."""

CLIENTS, EXAMPLES = 16, 8
"""Read to estimate lengths."""

TEXT = frozenset({"rouge_l", "exact_match", "score"})


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of an example, and labels among them."""

    tokens: float
    labels: float


def lengths(e: Experiment) -> Lengths:
    """Of a few training examples of a few clients, in the model's own tokens."""
    config, found = e.config, list[tuple[int, int]]()
    tokenizer = tokenizer_of(config.model.name_or_path)
    rules = (config.data.template, config.training.max_length, config.training.train_on_prompt)
    step = max(1, len(e.seen) // CLIENTS)
    for id in e.seen[::step][:CLIENTS]:
        for example in list(e.population[id].load("train"))[:EXAMPLES]:
            try:
                tokens = encode(example, tokenizer, *rules, config.data.system)
            except AnswerTooLong:
                continue
            found.append((len(tokens.ids), label_count(tokens)))
    if not found:
        raise ValueError(
            f"no answer of the first examples fits training.max_length {rules[1]}; raise it."
        )
    return Lengths(*(sum(column) / len(found) for column in zip(*found, strict=True)))


@dataclass(frozen=True)
class Work:
    """What evaluations cost: tokens read, and tokens written (at most)."""

    read: float = 0.0
    written: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.read + other.read, self.written + other.written)


def evaluations(e: Experiment, mean: Lengths) -> Work:
    """Of a whole run: the base model and the trained one, own ranks, and what is on the way."""
    wanted, rounds = e.config.evaluation, e.schedule.rounds
    whole = _one(e, mean, "test", wanted.metrics, wanted.max_clients)
    own = _one(e, mean, "test", ("loss",), wanted.max_clients, unseen=False)
    shown = wanted.samples * (2 if e.unseen else 0)
    answers = Work(shown * mean.tokens, shown * wanted.max_new_tokens)
    total = whole + whole + own + answers
    if wanted.every:
        times = 1 + rounds // wanted.every + bool(rounds % wanted.every)
        limit = e.config.checkpoints.monitor_clients
        each = _one(e, mean, "eval", wanted.metrics_on_the_way, limit)
        total += Work(times * each.read, times * each.written)
    return total


def _one(
    e: Experiment,
    mean: Lengths,
    split: Split,
    metrics: Sequence[str],
    limit: int | None,
    unseen: bool = True,
) -> Work:
    wanted, read, written = e.config.evaluation, 0.0, 0.0
    for group in (e.seen, e.unseen if unseen else ()):
        sizes = [n for c in group if (n := e.population[c].sizes.get(split, 0))]
        share = min(1.0, limit / len(sizes)) if limit and sizes else 1.0
        examples = share * sum(min(n, wanted.max_examples or n) for n in sizes)
        passes = len({"loss", "rouge_l_teacher_forced"} & set(metrics))
        asked = 0.0
        if TEXT & set(metrics):
            asked = share * sum(min(n, wanted.max_generated or n) for n in sizes)
        read += examples * passes * mean.tokens + asked * (mean.tokens - mean.labels)
        written += asked * wanted.max_new_tokens
    return Work(read, written)


def seconds(
    e: Experiment, outline: Outline, tokens_per_round: float, mean: Lengths, speed: float
) -> dict[str, float]:
    """Of training and of the server's part a round, of evaluation and of everything in a run.

    Args:
        e: the experiment.
        outline: of its base model.
        tokens_per_round: read in training.
        mean: of an example.
        speed: FLOP/s of a matrix product.
    """
    N, rounds, work = outline.parameters, e.schedule.rounds, evaluations(e, mean)
    training = 4 * N * tokens_per_round / (TRAINING * speed)
    server = SERVER * _aggregation(e) if e.method.averages == "products" else 0.0
    evaluation = 2 * N * (work.read / SCORING + work.written / WRITING) / speed
    return {
        "training_per_round": training,
        "server_per_round": server,
        "evaluation": evaluation,
        "total": rounds * (training + server) + evaluation,
    }


def _aggregation(e: Experiment) -> float:
    """By the cost model of :mod:`flexlora.lowrank`, whose rates are those of two CPU cores."""
    specs = [c.lora for c in e.clients.values()]
    cohort, total = e.schedule.cohort_size, 0.0
    known: dict[tuple[Any, ...], float] = {}
    for module, shape in e.shapes.items():
        ranks = [spec.rank(module) for spec in specs]
        key = (shape, round(sum(ranks) / len(ranks) * cohort), max(ranks))
        if key not in known:
            path = choose(shape, cohort, *key[1:])
            known[key] = cost(path, shape, cohort, *key[1:]).seconds
        total += known[key]
    return total


def memory(
    e: Experiment,
    outline: Outline,
    trained: Sequence[Sequence[int]],
    mean: Lengths,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, int]:
    """Bytes while clients train: the base, the clients that are there at once, activations.

    Args:
        e: the experiment.
        outline: of its base model.
        trained: numbers that each client of a cohort trains, of every round.
        mean: of an example.
        device: where it runs.
        dtype: of the base.
    """
    size, training = Size.of(outline.config), e.training
    most = max(trained, key=sum)
    slots: int | str = training.group_size
    if isinstance(slots, str):
        slots = auto_clients(len(most), max(most), free_on(device))
    there = sorted(most)[-slots:]
    budget: int | str = training.tokens_per_forward
    if isinstance(budget, str):
        budget = auto_tokens(size, dtype.itemsize, device, training.gradient_checkpointing)
    step = len(there) * training.batch_size * mean.tokens
    tokens = round(max(mean.tokens, min(budget, step)))
    labels = round(tokens * mean.labels / mean.tokens)
    peak = peak_bytes(size, dtype.itemsize, there, tokens, labels, training.gradient_checkpointing)
    base = outline.parameters * dtype.itemsize
    if e.config.model.bits:
        linear = sum(d_out * d_in for d_out, d_in in outline.shapes.values())
        base -= linear * dtype.itemsize - linear * e.config.model.bits // 8
    return {"base": base, **peak, "peak": base + sum(peak.values())}


def matmul_speed(hidden: int, wide: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of 2,048 tokens through a layer of these widths, the best of ten; about 0.4 s."""
    x, w = (torch.randn(n, hidden, device=device).to(dtype) for n in (2048, wide))

    def products(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            y = linear(x, w)
        y[0, 0].item()  # waits for a GPU
        return time.perf_counter() - began

    products(1)
    times = max(1, int(0.03 / max(products(1), 1e-6)))
    return 2.0 * 2048 * hidden * wide * times / min(products(times) for _ in range(10))
