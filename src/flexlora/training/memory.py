"""How much fits: clients at once, tokens at once, and what to do when it did not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

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


@dataclass(eq=False)
class Budget:
    """Tokens of one forward: a bound on activation memory, halved when it proves too high.

    Attributes:
        tokens: now; part of what a checkpoint must hold for the same bits.
        where: the device, for the message.
    """

    tokens: int
    where: str = ""

    @classmethod
    def of(cls, wanted: int | Literal["auto"], base: Base, checkpointed: bool = False) -> Budget:
        """The setting, or what `auto` stands for here."""
        return cls(token_budget(wanted, base, checkpointed), str(base.device))

    def halve(self, longest: int) -> None:
        """After running out of memory; says so.

        Raises:
            MemoryError: one example of `longest` tokens at a time is too much already.
        """
        if self.tokens <= longest:
            raise MemoryError(
                f"out of memory with one example of {longest} tokens at a time. Lower max_length "
                "or group_size, turn on gradient_checkpointing, or use a smaller base model."
            )
        where = f" on {self.where}" if self.where else ""
        before, self.tokens = self.tokens, max(longest, self.tokens // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory{where} at {before} tokens per forward: the step is done again with "
            f"{self.tokens}, and so are all that follow.",
            RuntimeWarning,
            stacklevel=2,
        )


def exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


def group_size(wanted: int | Literal["auto"], base: Base, payloads: Sequence[Payload]) -> int:
    """Clients on the base at once: all that are there, as far as a quarter of free memory holds."""
    if wanted != "auto":
        return min(wanted, len(payloads))
    largest = max(num_parameters(p.adapter) for p in payloads)
    return auto_clients(len(payloads), largest, free_memory(base))


def auto_clients(there: int, largest: int, free: int) -> int:
    """What `auto` is for so many clients, of at most so many trained numbers, and free bytes."""
    fit = int(SHARE * free / (BYTES_PER_TRAINED_NUMBER * max(largest, 1)))
    return max(1, min(there, MOST_CLIENTS, fit))


def token_budget(wanted: int | Literal["auto"], base: Base, checkpointed: bool = False) -> int:
    """Tokens of one forward. `auto`: what keeps the hardware busy and no more.

    A CPU gains little beyond 2,048 tokens; a GPU wants many. Both are cut down to what a quarter of
    free memory holds of activations and of logits, of which there are at most as many as tokens.
    """
    if wanted != "auto":
        return wanted
    size = Size.of(base.model.config)
    return auto_tokens(size, base.dtype.itemsize, base.device, checkpointed)


def auto_tokens(size: Size, itemsize: int, device: torch.device, checkpointed: bool = False) -> int:
    """What `auto` is for a model of this size, before or after it is loaded."""
    each = size.activations(itemsize, checkpointed) + size.logits  # all tokens labels
    fit = int(SHARE * free_on(device) / each)
    return max(128, min(2048 if device.type == "cpu" else 32768, fit))


@dataclass(frozen=True)
class Size:
    """The numbers of a model's configuration that memory depends on."""

    layers: int
    hidden: int
    wide: int
    heads: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Size:
        """From a transformers configuration."""
        text = config.get_text_config()
        wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        heads = text.num_attention_heads
        return cls(text.num_hidden_layers, text.hidden_size, wide, heads, text.vocab_size)

    def activations(self, itemsize: int, checkpointed: bool = False) -> float:
        """Bytes that a token keeps until its backward: one layer's, times layers unless redone.

        Of a decoder layer: inputs of norms, adapters and attention (8 of the hidden width; in half
        precision its norms keep float32 copies, 4 more) and of the gated MLP (4 of its width).
        """
        hidden = (8 if itemsize >= 4 else 12) * self.hidden
        layer = (hidden + 4 * self.wide) * itemsize
        return layer + self.layers * self.hidden * itemsize if checkpointed else layer * self.layers

    @property
    def logits(self) -> int:
        """Bytes of a label: its softmax and two gradients in float32."""
        return 12 * self.vocabulary


def peak_bytes(
    size: Size,
    itemsize: int,
    trained: Sequence[int],
    tokens: int,
    labels: int,
    checkpointed: bool = False,
) -> dict[str, int]:
    """Peak memory of training, predicted: `clients` and `activations`, on top of the base model.

    Within 20 % of what was measured on a CPU (tests); attention's own working memory, which is
    bounded by one layer's, is not counted.

    Args:
        size: of the base model.
        itemsize: bytes of one activation.
        trained: trained numbers of each client that is there at once.
        tokens: of one forward.
        labels: among them.
        checkpointed: with gradient checkpointing.

    >>> size = Size(layers=30, hidden=576, wide=1536, heads=9, vocabulary=49152)
    >>> {k: v >> 20 for k, v in peak_bytes(size, 4, [5_000_000] * 16, 2048, 300).items()}
    {'clients': 1220, 'activations': 2688}
    """
    low = itemsize if itemsize < 4 else 0  # the copy in the precision of the activations
    return {
        "clients": sum(trained) * (BYTES_PER_TRAINED_NUMBER + low),
        "activations": int(
            tokens * size.activations(itemsize, checkpointed) + labels * size.logits
        ),
    }


def free_memory(base: Base) -> int:
    """Bytes that are free where the base model is."""
    return free_on(base.device)


def free_on(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
