"""Examples of several slots as one model input: flat where the model allows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from flexlora.data.templates import Tokens
from flexlora.training.attention import flat_inputs
from flexlora.training.models import Base

Item = tuple[int, Tokens]
"""The slot of the bank that an example belongs to, and the example."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward pass.

    Attributes:
        inputs: keyword arguments of the model.
        slots, sizes: for :meth:`flexlora.training.bank.Bank.routed`.
        at: positions, in the flattened tokens, from which a label is predicted.
        labels: the tokens predicted there.
        owner: the slot of each label.
        lengths: tokens of each example.
        tokens: real tokens; `inputs` may hold more (padding).
        flat: whether logits are wanted at `at` only.
    """

    inputs: Mapping[str, Any]
    slots: tuple[int, ...]
    sizes: tuple[int, ...]
    at: Int[Tensor, " labels"]
    labels: Int[Tensor, " labels"]
    owner: Int[Tensor, " labels"]
    lengths: list[int]
    tokens: int
    flat: bool

    def logits(self, base: Base) -> Float[Tensor, "labels vocab"]:
        """Logits where there is a label; the widest layer sees nothing else."""
        if self.flat:
            out = base.model(**self.inputs, logits_to_keep=self.at, use_cache=False)
            return widened(out.logits[0])
        out = base.model(**self.inputs, use_cache=False)
        return widened(out.logits.flatten(0, 1)[self.at])

    def losses(self, base: Base) -> Float[Tensor, " labels"]:
        """Cross-entropy of each label, in nats."""
        return cross_entropy(self.logits(base), self.labels, reduction="none")


def collate(base: Base, items: Sequence[Item]) -> Batch:
    """Lay examples end to end (or pad them where the model cannot take that), sorted by slot."""
    items = sorted(items, key=lambda item: item[0])
    rows = [torch.tensor(t.ids) for _, t in items]
    lengths = [len(r) for r in rows]
    longest = max(lengths)
    at, labels, owner, start = [], [], [], 0
    for (slot, t), row in zip(items, rows, strict=True):
        first = max(t.labels_from, 1)
        at.append(torch.arange(start + first - 1, start + len(row) - 1))
        labels.append(row[first:])
        owner.append(torch.full((len(row) - first,), slot))
        start += len(row) if base.flat else longest
    runs = [(slot, list(group)) for slot, group in groupby(items, key=lambda item: item[0])]
    if base.flat:
        inputs = flat_inputs(torch.cat(rows), lengths, base.device)
        sizes = [sum(len(t.ids) for _, t in group) for _, group in runs]
    else:
        pad_id = base.tokenizer.pad_token_id
        ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
        mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        inputs = {"input_ids": ids.to(base.device), "attention_mask": mask.to(base.device)}
        sizes = [len(group) for _, group in runs]
    positions, targets, owners = (torch.cat(x).to(base.device) for x in (at, labels, owner))
    slots = tuple(slot for slot, _ in runs)
    return Batch(
        inputs, slots, tuple(sizes), positions, targets, owners, lengths, sum(lengths), base.flat
    )


def widened(logits: Tensor) -> Tensor:
    """At least float32: a softmax over a vocabulary needs it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def chunks(items: Sequence[Item], budget: int) -> Iterator[list[Item]]:
    """Consecutive runs of examples of at most `budget` tokens each (or one longer example)."""
    chunk: list[Item] = []
    size = 0
    for item in items:
        n = len(item[1].ids)
        if chunk and size + n > budget:
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += n
    if chunk:
        yield chunk
