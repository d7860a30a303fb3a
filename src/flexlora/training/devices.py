"""A round on several devices: the base model copied to each, one group of clients on each.

A Python thread per device queues its work; torch releases the interpreter lock in its kernels.
Who trains where is a function of the cohort alone, so that a resume computes the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from threading import Lock

import torch
from torch import nn

from flexlora.federation.state import Update
from flexlora.training.ahead import Check, at_once
from flexlora.training.client import Job, Progress, train
from flexlora.training.memory import Budget
from flexlora.training.models import Base, ModelError, resolve_device
from flexlora.training.settings import LocalTraining


def resolve_devices(names: Sequence[str]) -> list[str]:
    """The devices of a list; `auto`, on its own, is the first GPU or the CPU.

    Raises:
        ModelError: one that is not there, is named twice (a CPU may be), or is of another kind.
    """
    if len(names) == 1:
        return [resolve_device(names[0])]
    found = [resolve_device("cuda:0" if name == "cuda" else name) for name in names]
    kinds = {torch.device(name).type for name in found}
    if "auto" in names or len(kinds) > 1 or (kinds != {"cpu"} and len(set(found)) < len(found)):
        raise ModelError(
            f"model.device: {', '.join(names)}; expected different devices of one kind, such as "
            "[cuda:0, cuda:1]; auto stands alone and takes one."
        )
    return found


def replica(base: Base, device: str) -> Base:
    """The same base model with its weights copied to another device, tensor by tensor."""
    made: dict[int, object] = {}
    for p in base.model.parameters():
        made[id(p)] = nn.Parameter(p.detach().to(device, copy=True), requires_grad=False)
    for b in base.model.buffers():
        made[id(b)] = b.to(device, copy=True)
    return replace(base, model=copy.deepcopy(base.model, made))  # tensors from there, layers anew


def deal(work: Mapping[str, int], groups: int) -> list[list[str]]:
    """Clients into groups: the longest first, each to the group with least to do so far.

    >>> deal({"a": 5, "b": 3, "c": 3, "d": 1}, 2)
    [['a', 'd'], ['b', 'c']]
    """
    dealt: list[list[str]] = [[] for _ in range(groups)]
    loads = [0] * groups
    for client in sorted(work, key=lambda c: (-work[c], c)):
        k = loads.index(min(loads))
        dealt[k].append(client)
        loads[k] += work[client]
    return dealt


def train_on(
    bases: Sequence[Base],
    jobs: Sequence[Job],
    training: LocalTraining,
    seed: int,
    on_step: Callable[[Progress], None] | None,
    budgets: Sequence[Budget],
) -> Iterator[Update]:
    """:func:`~flexlora.training.client.train` for a group of the jobs on each base, at once.

    Dealt by the examples that clients draw. Updates are brought to the first device.

    Raises:
        Exception: the first that a group raises; the others have stopped by then.
    """
    by_id = {job.client.id: job for job in jobs}
    work = {c: training.draws(job.client.num_examples) for c, job in by_id.items()}
    groups = deal(work, len(bases))
    lock, done = Lock(), [0] * len(bases)

    def group(k: int, stopped: Check) -> Iterator[Update]:
        def report(step: Progress) -> None:
            stopped()
            with lock:
                done[k] = step.clients_done
                if on_step:
                    on_step(_shared(step, sum(done), len(jobs), len(bases)))

        if bases[k].device.type == "cuda":
            torch.cuda.set_device(bases[k].device)  # of this thread
        own = [by_id[c] for c in groups[k]]
        for update in train(bases[k], own, training, seed, report, budgets[k]):
            adapter = {m: d.to(device=bases[0].device) for m, d in update.adapter.items()}
            yield replace(update, adapter=adapter)

    yield from at_once([partial(group, k) for k in range(len(bases))])


def _shared(step: Progress, done: int, clients: int, devices: int) -> Progress:
    """One device's report as part of all: of seconds a share, so that rates and sums are right."""
    phases = {name: seconds / devices for name, seconds in step.phases.items()}
    seconds = step.seconds / devices
    return replace(step, clients_done=done, clients=clients, seconds=seconds, phases=phases)
