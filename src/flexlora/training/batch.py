"""Examples of several slots as one model input: flat where the model allows it.

In a flat batch, examples of one slot that begin alike share those tokens: under a causal model and
the same adapter they have the same hidden states, so they are computed once and attended to by all.
Tasks whose examples repeat their instruction gain most.
"""

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
from flexlora.training.attention import flat_inputs, moved
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
        order: which of the given items each example is; labels stand in this order.
        counts: labels of each example.
        lengths: tokens of each example.
        flat: whether logits are wanted at `at` only.
    """

    inputs: Mapping[str, Any]
    slots: tuple[int, ...]
    sizes: tuple[int, ...]
    at: Int[Tensor, " labels"]
    labels: Int[Tensor, " labels"]
    order: list[int]
    counts: list[int]
    lengths: list[int]
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

    def per_label(self, values: Sequence[float] | Sequence[int], dtype: torch.dtype) -> Tensor:
        """One value per given item, repeated for each of its labels."""
        ordered = torch.tensor([values[i] for i in self.order], dtype=dtype)
        counts = torch.tensor(self.counts)
        total = int(self.labels.shape[0])
        repeated = torch.repeat_interleave(ordered, counts, output_size=total)
        return moved(repeated, self.labels.device)


def collate(base: Base, items: Sequence[Item], share: bool = True) -> Batch:
    """Lay examples end to end (or pad them where the model cannot take that), sorted by slot.

    Args:
        base: the model.
        items: examples with their slots.
        share: compute common beginnings within a slot once.
    """
    share = share and base.flat
    alike = [t.ids if share else () for _, t in items]
    order = sorted(range(len(items)), key=lambda i: (items[i][0], alike[i]))
    chosen = [items[i] for i in order]
    lay = _flat if base.flat else _padded
    inputs, rows, sizes = lay(base, chosen, share)
    slots = tuple(slot for slot, _ in groupby(slot for slot, _ in chosen))
    firsts = [max(t.labels_from, 1) for _, t in chosen]
    at = torch.cat([row[n - 1 : -1] for row, n in zip(rows, firsts, strict=True)])
    targets = [x for (_, t), n in zip(chosen, firsts, strict=True) for x in t.ids[n:]]
    return Batch(
        inputs,
        slots,
        sizes,
        moved(at, base.device),
        moved(torch.tensor(targets), base.device),
        order,
        [label_count(t) for _, t in chosen],
        [len(t.ids) for _, t in chosen],
        base.flat,
    )


def _flat(
    base: Base, items: Sequence[Item], share: bool
) -> tuple[dict[str, Any], list[Int[Tensor, " length"]], tuple[int, ...]]:
    """Inputs, the place of every token of every example in them, and tokens per slot."""
    ids: list[int] = []
    rows: list[Tensor] = []
    sizes: list[int] = []
    before: tuple[int, tuple[int, ...]] = (-1, ())
    for slot, t in items:
        if slot != before[0]:
            sizes.append(0)
        common = common_beginning(before[1], t.ids) if share and slot == before[0] else 0
        new = torch.arange(len(ids), len(ids) + len(t.ids) - common)
        rows.append(torch.cat([rows[-1][:common], new]) if common else new)
        ids += t.ids[common:]
        sizes[-1] += len(t.ids) - common
        before = slot, t.ids
    return flat_inputs(torch.tensor(ids), rows, base.device), rows, tuple(sizes)


def _padded(
    base: Base, items: Sequence[Item], share: bool
) -> tuple[dict[str, Any], list[Int[Tensor, " length"]], tuple[int, ...]]:
    """The same for rows padded on the right; sizes are rows per slot."""
    texts = [torch.tensor(t.ids) for _, t in items]
    ids = pad_sequence(texts, batch_first=True, padding_value=base.tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones_like(r) for r in texts], batch_first=True)
    inputs = {"input_ids": moved(ids, base.device), "attention_mask": moved(mask, base.device)}
    rows = [n * ids.shape[1] + torch.arange(len(text)) for n, text in enumerate(texts)]
    sizes = tuple(len(list(group)) for _, group in groupby(slot for slot, _ in items))
    return inputs, rows, sizes


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two examples have in common at the start.

    >>> common_beginning((1, 2, 3), (1, 2, 4, 5))
    2
    """
    for n, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return n
    return min(len(one), len(other))


def label_count(tokens: Tokens) -> int:
    """Labels of an example; its first token is never one."""
    return len(tokens.ids) - max(tokens.labels_from, 1)


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


def packed(items: Sequence[Item], budget: int) -> Iterator[list[Item]]:
    """Chunks of whole slots, in order: where a slot is cut depends on its own examples only.

    So what its examples share, and with it every bit of its gradient's sum over examples, does not
    depend on who trains beside it.
    """
    pack: list[Item] = []
    size = 0
    for _, group in groupby(items, key=lambda item: item[0]):
        for piece in chunks(list(group), budget):
            n = sum(len(t.ids) for _, t in piece)
            if pack and size + n > budget:
                yield pack
                pack, size = [], 0
            pack += piece
            size += n
    if pack:
        yield pack
