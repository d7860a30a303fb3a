"""Greedy generation for many clients in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from flexlora.training.bank import Bank
from flexlora.training.models import Base


def generate(
    base: Base,
    bank: Bank,
    prompts: Mapping[str, Sequence[tuple[int, ...]]],
    slot_of: Mapping[str, int],
    budget: int,
    max_new_tokens: int,
) -> dict[str, list[str]]:
    """Greedy answers, many clients in one batch with a key/value cache; prompts of like length."""
    asked = [
        (len(prompt), slot_of[c], c, n, prompt)
        for c, own in prompts.items()
        for n, prompt in enumerate(own)
    ]
    texts: dict[str, list[str]] = {c: [""] * len(own) for c, own in prompts.items()}
    asked.sort(key=lambda row: row[:2])
    while asked:
        rows = max(1, min(len(asked), 32, budget // (asked[-1][0] + max_new_tokens)))
        taken, asked = sorted(asked[-rows:], key=lambda row: row[1]), asked[:-rows]
        out = _generate_batch(base, bank, taken, max_new_tokens)
        for (_, _, c, n, _), text in zip(taken, out, strict=True):
            texts[c][n] = text
    return texts


def _generate_batch(
    base: Base, bank: Bank, rows: Sequence[tuple[Any, ...]], max_new_tokens: int
) -> list[str]:
    longest, pad = max(row[0] for row in rows), base.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for *_, p in rows])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for *_, p in rows])
    slots = [row[1] for row in rows]
    runs, model = sorted(set(slots)), cast(Any, base.model)
    with bank.routed(runs, [slots.count(slot) for slot in runs]):
        out = model.generate(
            input_ids=ids.to(base.device),
            attention_mask=mask.to(base.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=base.tokenizer.eos_token_id,
        )
    return [
        t.strip() for t in base.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    ]
