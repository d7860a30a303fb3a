"""Settings of a client's local round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from flexlora.training.optim import Rule


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
        gradient_checkpointing: keep one activation per layer and compute the others again.
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
    gradient_checkpointing: bool = False

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
