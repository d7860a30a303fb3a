"""How many clients, and how many tokens, fit at once: the two numbers that `auto` stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import psutil
import torch

from flexlora.adapter import num_parameters
from flexlora.federation.state import Payload
from flexlora.training.models import Base

BYTES_PER_TRAINED_NUMBER = 16
"""Factor, gradient and AdamW's two moments, in float32."""

MOST_CLIENTS = 64
SHARE = 0.25
"""Of free memory that a bank may take; activations and the server need the rest."""


def group_size(wanted: int | Literal["auto"], base: Base, payloads: Sequence[Payload]) -> int:
    """Clients on the base at once: all that are there, as far as a quarter of free memory holds.

    Every slot is as wide as the largest adapter.
    """
    if wanted != "auto":
        return min(wanted, len(payloads))
    largest = max(num_parameters(p.adapter) for p in payloads)
    fit = int(SHARE * free_memory(base) / (BYTES_PER_TRAINED_NUMBER * max(largest, 1)))
    return max(1, min(len(payloads), MOST_CLIENTS, fit))


def token_budget(wanted: int | Literal["auto"], base: Base) -> int:
    """Tokens of one forward. `auto`: what keeps the hardware busy and no more.

    A CPU gains little beyond 1,024 tokens; a GPU wants many. Both are cut down to what a quarter of
    free memory holds of activations and of logits, of which there are at most as many as tokens.
    """
    if wanted != "auto":
        return wanted
    config = base.model.config.get_text_config()
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    activations = (
        config.num_hidden_layers * (12 * config.hidden_size + 4 * wide) * base.dtype.itemsize
    )
    fit = int(SHARE * free_memory(base) / (activations + 12 * config.vocab_size))
    return max(128, min(2048 if base.device.type == "cpu" else 32768, fit))


def free_memory(base: Base) -> int:
    """Bytes that are free where the base model is."""
    if base.device.type == "cuda":
        return int(torch.cuda.mem_get_info(base.device)[0])
    return int(psutil.virtual_memory().available)
