"""Gradients of one optimiser step of a whole group: forwards and backwards within a budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from flexlora.training.bank import Bank
from flexlora.training.batch import Item, collate, label_count, packed
from flexlora.training.dropout import Dropout
from flexlora.training.memory import Budget, exhausted
from flexlora.training.models import Base
from flexlora.training.stopwatch import Stopwatch


def gradients(
    base: Base,
    bank: Bank,
    items: Sequence[Item],
    dropout: tuple[float, Sequence[int]],
    budget: Budget,
    clock: Stopwatch,
) -> Tensor:
    """Add every slot's gradient to its buffer; the mean loss of each slot.

    A slot's loss is the sum over the labels of its examples divided by their number, so it does not
    matter how the examples are cut into forwards. Out of memory: half the tokens, from the start.

    Args:
        base: the frozen model.
        bank: with the slots loaded and their gradients zero.
        items: examples with their slots.
        dropout: probability, and a seed for each example.
        budget: tokens of one forward.
        clock: laps of data, forward, backward.

    Raises:
        MemoryError: one example at a time is too much.
    """
    while True:
        try:
            return _passes(base, bank, items, dropout, budget.tokens, clock)
        except (RuntimeError, MemoryError) as error:
            if not exhausted(error):
                raise
        # Here the error and the activations its frames hold are gone.
        for slot in {slot for slot, _ in items}:
            bank.held(slot).grad.zero_()
        budget.halve(longest=max(len(t.ids) for _, t in items))


def _passes(
    base: Base,
    bank: Bank,
    items: Sequence[Item],
    dropout: tuple[float, Sequence[int]],
    budget: int,
    clock: Stopwatch,
) -> Tensor:
    counts: dict[int, int] = defaultdict(int)
    for slot, t in items:
        counts[slot] += label_count(t)
    losses = torch.zeros(len(bank.slots), dtype=bank.dtype, device=base.device)
    (p, seeds), first = dropout, 0
    for chunk in packed(items, budget):
        # A dropout mask belongs to one example, so then examples share no token.
        batch = collate(base, chunk, share=not p)
        keys = [seeds[first + i] for i in batch.order]
        masks = Dropout.for_examples(p, keys, batch.lengths, base.device) if p else None
        weights = batch.per_label([1 / counts[slot] for slot, _ in chunk], bank.dtype)
        owner = batch.per_label([slot for slot, _ in chunk], torch.long)
        clock.lap("data")
        with bank.routed(batch.slots, batch.sizes, masks):
            loss = batch.losses(base) * weights
            clock.lap("forward")
            loss.sum().backward()  # type: ignore[no-untyped-call]
        losses.index_add_(0, owner, loss.detach().to(losses.dtype))
        first += len(chunk)
        clock.lap("backward")
    return losses
