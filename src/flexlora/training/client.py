"""The local loop: what a client does between the payload it gets and the update it returns.

Many clients run it at once on one bank. Each has its own data order, learning rate, clipping and
optimiser state; a client that is done leaves its slot to the next. What a client computes does not
depend on who trains beside it (to rounding).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from flexlora.adapter import stable_seed
from flexlora.data.templates import Tokens
from flexlora.federation.state import Client, Payload, Update
from flexlora.training.bank import Bank
from flexlora.training.batch import Item, chunks, collate
from flexlora.training.dropout import Dropout
from flexlora.training.memory import group_size, token_budget
from flexlora.training.models import Base
from flexlora.training.optim import Moments, Rule, clip_, step_


@dataclass(frozen=True)
class LocalTraining:
    """Settings of a client's round, under the names of `transformers.TrainingArguments`.

    Attributes:
        optimizer: its state is reset every round.
        learning_rate: before the schedules.
        lr_scheduler_type: within a client's round.
        warmup_ratio: share of the client's steps over which the rate rises from 0.
        round_schedule: round -> factor on the rate from that round on.
        per_device_train_batch_size: examples per optimiser step, times
        gradient_accumulation_steps: how they are cut into forwards is `tokens_per_forward`'s
            business and changes nothing but rounding.
        max_steps: optimiser steps per round; -1: `num_train_epochs` over the client's examples.
        max_grad_norm: per client; 0: no clipping.
        lora_dropout: on the adapters' input, by hashed masks (see `dropout`).
        group_size: clients on the base at once; `auto`: from memory, see :mod:`.memory`.
        tokens_per_forward: bound on activation memory; `auto` likewise.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: float = 0.0
    round_schedule: Mapping[int, float] = field(default_factory=dict)
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    max_steps: int = -1
    num_train_epochs: float = 1.0
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    lora_dropout: float = 0.0
    group_size: int | Literal["auto"] = "auto"
    tokens_per_forward: int | Literal["auto"] = "auto"

    @property
    def batch_size(self) -> int:
        """Examples per optimiser step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def rule(self) -> Rule:
        """The optimiser with its constants."""
        betas = (self.adam_beta1, self.adam_beta2)
        return Rule(self.optimizer, betas, self.adam_epsilon, self.weight_decay)

    def draws(self, num_examples: int) -> int:
        """Examples that a client with so many takes in a round; its last step may be short."""
        if self.max_steps > 0:
            return self.max_steps * self.batch_size
        return max(1, math.ceil(num_examples * self.num_train_epochs))

    def rate(self, step: int, steps: int, round: int) -> float:
        """Learning rate of a client's step (from 0) in a round (from 1).

        >>> LocalTraining(learning_rate=1.0, lr_scheduler_type="linear").rate(1, 4, round=1)
        0.75
        >>> LocalTraining(learning_rate=1.0, round_schedule={15: 0.5}).rate(0, 1, round=20)
        0.5
        """
        passed = [r for r in self.round_schedule if r <= round]
        base = self.learning_rate * (self.round_schedule[max(passed)] if passed else 1.0)
        warm = self.warmup_ratio * steps
        if step < warm:
            return base * (step + 1) / (warm + 1)
        done = (step - warm) / max(1.0, steps - warm)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return base * shape[self.lr_scheduler_type]


@dataclass(frozen=True)
class Job:
    """One client's work in a round; `load` reads its training examples when its turn comes."""

    client: Client
    payload: Payload
    load: Callable[[], Sequence[Tokens]]


@dataclass(frozen=True)
class Progress:
    """What a step of the whole group did, for people."""

    clients_done: int
    clients: int
    tokens: int
    loss: float
    seconds: float


@dataclass(eq=False)
class _Running:
    """A client in its slot."""

    job: Job
    examples: Sequence[Tokens]
    order: list[int]
    steps: int
    started: float
    step: int = 0
    tokens: int = 0
    losses: list[Tensor] = field(default_factory=list)


def train(
    base: Base,
    jobs: Iterable[Job],
    training: LocalTraining,
    seed: int,
    on_step: Callable[[Progress], None] | None = None,
) -> Iterator[Update]:
    """Train clients on one base, `group_size` at a time; yield each update when its client is done.

    Randomness: a client's data order is a function of `(seed, round, client)`, dropout of these and
    the step. Memory: the base once; per slot its factors, gradients and optimiser state, 16 bytes
    per trained number with AdamW; activations of `tokens_per_forward` tokens.

    Raises:
        ValueError: a client without training examples, or a payload for another base model.
    """
    waiting = list(jobs)
    total = len(waiting)
    if not total:
        return
    payloads = [job.payload for job in waiting]
    slots = group_size(training.group_size, base, payloads)
    if slots == 1 and total > 1:  # a bank as wide as each client: the bits of training it alone
        for before, job in enumerate(waiting):
            yield from train(base, [job], training, seed, _counted(on_step, before, total))
        return
    training = replace(training, tokens_per_forward=token_budget(training.tokens_per_forward, base))
    bank = bank_for(base, payloads, slots)
    params = bank.parameters(payloads[0].train)
    for p in params:
        p.requires_grad_(True)
    moments = Moments.zeros(params, training.rule)
    running: dict[int, _Running] = {}
    while waiting or running:
        for slot in range(slots):
            if slot not in running and waiting:
                running[slot] = _start(base, bank, slot, waiting.pop(0), training, seed)
                moments.reset(slot)
        began = time.perf_counter()
        tokens, losses = _group_step(base, bank, params, running, training, seed)
        rates = [0.0] * slots
        for slot, r in running.items():
            rates[slot] = training.rate(r.step, r.steps, r.job.payload.round)
            r.losses.append(losses[slot])
            r.step += 1
        clip_(params, training.max_grad_norm)
        step_(params, rates, moments, training.rule)
        done = [slot for slot, r in running.items() if r.step == r.steps]
        if on_step:
            mean = float(losses[list(running)].mean())
            finished = total - len(waiting) - len(running) + len(done)
            on_step(Progress(finished, total, tokens, mean, time.perf_counter() - began))
        for slot in done:
            yield _finish(bank, slot, running.pop(slot))


def _counted(
    on_step: Callable[[Progress], None] | None, done: int, total: int
) -> Callable[[Progress], None] | None:
    """Progress of one client among others before and after it."""
    if on_step is None:
        return None
    return lambda p: on_step(replace(p, clients_done=done + p.clients_done, clients=total))


def bank_for(base: Base, payloads: Sequence[Payload], slots: int) -> Bank:
    """A bank wide enough for each of these payloads in any slot."""
    ranks: dict[str, int] = {}
    for payload in payloads:
        if payload.base != base.fingerprint:
            raise ValueError(
                f"payload for client {payload.client!r}, round {payload.round}: made for base "
                f"{payload.base}, but {base.name} is {base.fingerprint}. Use the same base model."
            )
        for module, d in payload.adapter.items():
            ranks[module] = max(d.rank, ranks.get(module, 0))
    dtype = torch.promote_types(base.dtype, torch.float32)
    return Bank(base.model, base.shapes, ranks, slots, dtype)


def _start(
    base: Base, bank: Bank, slot: int, job: Job, training: LocalTraining, seed: int
) -> _Running:
    examples = job.load()
    if not examples:
        raise ValueError(
            f"client {job.client.id!r} (task {job.client.task!r}): no training examples; expected "
            "at least one. Leave it out of the federation or give it data."
        )
    bank.load(slot, job.payload.adapter, job.payload.frozen)
    key = (seed, job.payload.round, job.client.id, "order")
    order = data_order(len(examples), training.draws(len(examples)), *key)
    steps = math.ceil(len(order) / training.batch_size)
    return _Running(job, examples, order, steps, time.perf_counter())


def data_order(examples: int, count: int, *key: object) -> list[int]:
    """Indices of `count` draws: seeded permutations of all examples, one after another."""
    order: list[int] = []
    for epoch in range(math.ceil(count / examples)):
        generator = torch.Generator().manual_seed(stable_seed(*key, epoch))
        order += torch.randperm(examples, generator=generator).tolist()
    return order[:count]


def _group_step(
    base: Base,
    bank: Bank,
    params: Sequence[Tensor],
    running: Mapping[int, _Running],
    training: LocalTraining,
    seed: int,
) -> tuple[int, Tensor]:
    """Gradients of one optimiser step of every running client; tokens, and mean loss per slot.

    A client's loss is the sum over the labels of its step divided by their number, so it does not
    matter how the examples are cut into forwards.
    """
    items: list[Item] = []
    seeds: dict[int, int] = {}
    for slot in sorted(running):
        r = running[slot]
        size = training.batch_size
        for n, i in enumerate(r.order[r.step * size : (r.step + 1) * size]):
            items.append((slot, r.examples[i]))
            key = (seed, r.job.client.id, r.job.payload.round, r.step, n)
            seeds[len(items) - 1] = stable_seed("dropout", *key) if training.lora_dropout else 0
    labels = torch.zeros(len(bank.frozen), device=base.device)
    for slot, t in items:
        labels[slot] += len(t.ids) - max(t.labels_from, 1)
    total, losses = 0, torch.zeros_like(labels, dtype=params[0].dtype)
    for first, chunk in _numbered(chunks(items, int(training.tokens_per_forward))):
        batch = collate(base, chunk)
        dropout = None
        if training.lora_dropout:
            keys = [seeds[first + i] for i in range(len(chunk))]
            dropout = Dropout.for_examples(training.lora_dropout, keys, batch.lengths, base.device)
        with bank.routed(batch.slots, batch.sizes, dropout):
            loss = batch.losses(base) / labels[batch.owner]
        loss.sum().backward()  # type: ignore[no-untyped-call]
        losses.index_add_(0, batch.owner, loss.detach().to(losses.dtype))
        total += batch.tokens
        for slot, t in chunk:
            running[slot].tokens += len(t.ids)
    return total, losses


def _numbered(parts: Iterable[list[Item]]) -> Iterator[tuple[int, list[Item]]]:
    first = 0
    for part in parts:
        yield first, part
        first += len(part)


def _finish(bank: Bank, slot: int, r: _Running) -> Update:
    losses = torch.stack(r.losses).tolist()
    metrics = {
        "loss": sum(losses) / len(losses),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "steps": float(r.steps),
        "tokens": float(r.tokens),
        "seconds": time.perf_counter() - r.started,
    }
    payload = r.job.payload
    return Update(
        payload.client, payload.round, payload.base, bank.read(slot), len(r.examples), metrics
    )
