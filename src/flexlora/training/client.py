"""The local loop: what a client does between the payload it gets and the update it returns.

Many clients run it at once on one bank. Each has its own data order, learning rate, clipping and
optimiser state; a client that is done leaves its slot to the next. What a client computes does not
depend on who trains beside it (to rounding).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexlora.adapter import stable_seed
from flexlora.data.templates import Tokens
from flexlora.federation.state import Client, Payload, Update
from flexlora.training.ahead import ahead
from flexlora.training.bank import Bank
from flexlora.training.batch import Item
from flexlora.training.memory import Budget, group_size
from flexlora.training.models import Base, checkpointing
from flexlora.training.optim import Moments, clip_, step_
from flexlora.training.regularise import add_penalty_
from flexlora.training.settings import LocalTraining as LocalTraining
from flexlora.training.step import gradients
from flexlora.training.stopwatch import Stopwatch

REPORT_SECONDS = 0.2
"""Between two reports of progress: each waits for the device."""


@dataclass(frozen=True)
class Job:
    """One client's work in a round; `load` reads its training examples when its turn comes."""

    client: Client
    payload: Payload
    load: Callable[[], Sequence[Tokens]]


@dataclass(frozen=True)
class Progress:
    """What the group did since the last report, for people.

    Attributes:
        clients_done: of the round, so far.
        clients: of the round.
        tokens: real ones, since the last report.
        loss: of the last step, mean over its clients.
        seconds: since the last report.
        phases: seconds of these in data, forward, backward, optimizer (on a GPU: of the host).
    """

    clients_done: int
    clients: int
    tokens: int
    loss: float
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class _Running:
    """A client in its slot."""

    job: Job
    examples: Sequence[Tokens]
    order: list[int]
    steps: int
    moments: Moments
    started: float
    step: int = 0
    tokens: int = 0
    losses: list[Tensor] = field(default_factory=list)

    def drawn(self, batch_size: int) -> list[Tokens]:
        """The examples of its next step."""
        at = self.step * batch_size
        return [self.examples[i] for i in self.order[at : at + batch_size]]


def train(
    base: Base,
    jobs: Iterable[Job],
    training: LocalTraining,
    seed: int,
    on_step: Callable[[Progress], None] | None = None,
    budget: Budget | None = None,
) -> Iterator[Update]:
    """Train clients on one base, `group_size` at a time; yield each update when its client is done.

    Randomness: a client's data order is a function of `(seed, round, client)`, dropout of these and
    the step. Memory: the base once; per client its factors, gradients and optimiser state, 16 bytes
    per trained number with AdamW; activations of `tokens_per_forward` tokens. Where that many do
    not fit, the budget is halved and the step done again.

    Raises:
        ValueError: a client without training examples, or a payload for another base model.
        MemoryError: not even one example at a time fits.
    """
    # Those with most to do start first, so that none is left to work alone at the end.
    waiting = sorted(jobs, key=lambda job: -training.draws(job.client.num_examples))
    total = len(waiting)
    if not total:
        return
    payloads = [job.payload for job in waiting]
    slots = group_size(training.group_size, base, payloads)
    budget = budget or Budget.of(training.tokens_per_forward, base, training.gradient_checkpointing)
    bank = bank_for(base, payloads, slots)
    # A GPU works on while the next clients' text is read; a CPU would only be shared.
    depth = slots if base.device.type == "cuda" else 0
    running: dict[int, _Running] = {}
    clock, tokens = Stopwatch(), 0
    with (
        closing(ahead([job.load for job in waiting], depth)) as texts,
        checkpointing(base.model, training.gradient_checkpointing),
    ):
        while waiting or running:
            for slot in range(slots):
                if slot not in running and waiting:
                    running[slot] = _start(bank, slot, waiting.pop(0), next(texts), training, seed)
            clock.lap("data")
            losses = _gradients(base, bank, running, training, seed, budget, clock)
            _step(bank, running, training)
            for slot, r in running.items():
                drawn = r.drawn(training.batch_size)
                r.tokens += sum(len(t.ids) for t in drawn)
                tokens += sum(len(t.ids) for t in drawn)
                r.losses.append(losses[slot])
                r.step += 1
            clock.lap("optimizer")
            done = [slot for slot, r in running.items() if r.step == r.steps]
            if on_step and (clock.elapsed > REPORT_SECONDS or len(done) == len(running)):
                mean = float(losses[list(running)].mean())
                left = len(waiting) + len(running) - len(done)
                on_step(Progress(total - left, total, tokens, mean, clock.elapsed, clock.laps))
                clock, tokens = Stopwatch(), 0
            for slot in done:
                yield _finish(bank, slot, running.pop(slot))


def bank_for(base: Base, payloads: Sequence[Payload], slots: int) -> Bank:
    """An empty bank for these payloads; stacked on a GPU."""
    widest: dict[str, int] = {}
    if len({p.train for p in payloads}) > 1:
        raise ValueError(f"round {payloads[0].round}: payloads differ in which factors they train.")
    for payload in payloads:
        if payload.base != base.fingerprint:
            raise ValueError(
                f"payload for client {payload.client!r}, round {payload.round}: made for base "
                f"{payload.base}, but {base.name} is {base.fingerprint}. Use the same base model."
            )
        for module, d in payload.adapter.items():
            widest[module] = max(d.rank, widest.get(module, 0))
    dtype = torch.promote_types(base.dtype, torch.float32)
    stacked = base.device.type == "cuda" and not any(p.mask for p in payloads)
    return Bank(
        base.model,
        base.shapes,
        slots,
        dtype,
        base.dtype,
        payloads[0].train,
        widest if stacked else None,
    )


def _start(
    bank: Bank, slot: int, job: Job, examples: Sequence[Tokens], training: LocalTraining, seed: int
) -> _Running:
    if not examples:
        raise ValueError(
            f"client {job.client.id!r} (task {job.client.task!r}): no training examples; expected "
            "at least one. Leave it out of the federation or give it data."
        )
    payload = job.payload
    loaded = bank.load(slot, payload.adapter, payload.frozen, payload.mask)
    key = (seed, payload.round, job.client.id, "order")
    order = data_order(len(examples), training.draws(len(examples)), *key)
    steps = math.ceil(len(order) / training.batch_size)
    moments = Moments.zeros(loaded, training.rule)
    return _Running(job, examples, order, steps, moments, time.perf_counter())


def data_order(examples: int, count: int, *key: object) -> list[int]:
    """Indices of `count` draws: seeded permutations of all examples, one after another."""
    order: list[int] = []
    for epoch in range(math.ceil(count / examples)):
        generator = torch.Generator().manual_seed(stable_seed(*key, epoch))
        order += torch.randperm(examples, generator=generator).tolist()
    return order[:count]


def _gradients(
    base: Base,
    bank: Bank,
    running: Mapping[int, _Running],
    training: LocalTraining,
    seed: int,
    budget: Budget,
    clock: Stopwatch,
) -> Tensor:
    """Gradients of the next step of every running client, and the mean loss of each slot."""
    items: list[Item] = []
    seeds: list[int] = []
    for slot, r in sorted(running.items()):
        for n, tokens in enumerate(r.drawn(training.batch_size)):
            items.append((slot, tokens))
            key = (seed, r.job.client.id, r.job.payload.round, r.step, n)
            seeds.append(stable_seed("dropout", *key) if training.lora_dropout else 0)
    losses = gradients(base, bank, items, (training.lora_dropout, seeds), budget, clock)
    for slot, r in running.items():
        add_penalty_(bank.held(slot), r.job.payload)
    return losses


def _step(bank: Bank, running: Mapping[int, _Running], training: LocalTraining) -> None:
    """Clip and step every running client; those at the same learning rate in one call."""
    by_rate: dict[float, list[int]] = defaultdict(list)
    for slot, r in running.items():
        by_rate[training.rate(r.step, r.steps, r.job.payload.round)].append(slot)
        clip_(bank.held(slot), training.max_grad_norm)
    for rate, slots in by_rate.items():
        moments = [running[slot].moments for slot in slots]
        step_([bank.held(slot) for slot in slots], moments, rate, training.rule)


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
