"""What is predicted about memory is what is measured."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from flexlora.adapter import initial_adapter, num_parameters
from flexlora.data.templates import Tokens
from flexlora.training.bank import Bank
from flexlora.training.batch import collate
from flexlora.training.memory import Budget, Size, exhausted, peak_bytes
from flexlora.training.models import Base, ModelError, as_base, checkpointing, load_base
from flexlora.training.optim import Moments, Rule, step_

LENGTHS, LABELS = [130, 110, 140, 125] * 4, 4


def middling(dtype: torch.dtype) -> Base:
    """Large enough that activations outweigh everything that does not grow with tokens."""
    config = LlamaConfig(
        vocab_size=2000, hidden_size=192, intermediate_size=512, num_hidden_layers=12,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    return as_base(LlamaForCausalLM(config).to(dtype), tiny.tokenizer(), "middling")


def peak_allocated(work: Callable[[], None]) -> int:
    """The most that torch's CPU allocator held for `work` at any moment, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    found = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    return max(accumulate(n for _, n in changes))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_predicted_within_a_fifth(checkpointed: bool, dtype: torch.dtype) -> None:
    base = middling(dtype)
    adapter = initial_adapter(base.shapes, dict.fromkeys(base.shapes, 16), 0)
    items = [
        (n % 4, Tokens(tuple(range(7 * n, 7 * n + length)), (1,) * LABELS, length))
        for n, length in enumerate(LENGTHS)
    ]

    def work() -> None:
        bank = Bank(base.model, base.shapes, 4, activations=dtype, train="AB")
        slots = [bank.load(k, adapter) for k in range(4)]
        moments = [Moments.zeros(s, Rule()) for s in slots]
        batch = collate(base, items)
        with checkpointing(base.model, checkpointed), bank.routed(batch.slots, batch.sizes):
            batch.losses(base).sum().backward()
        step_(slots, moments, 1e-3, Rule())

    work()
    trained, tokens = [num_parameters(adapter)] * 4, sum(len(t.ids) for _, t in items)
    size, labels = Size.of(base.model.config), LABELS * len(items)
    predicted = peak_bytes(size, dtype.itemsize, trained, tokens, labels, checkpointed)
    assert sum(predicted.values()) == pytest.approx(peak_allocated(work), rel=0.2)


def test_a_quantized_base_on_a_cpu_is_refused() -> None:
    with pytest.raises(ModelError, match="quantization_config needs a GPU"):
        load_base("smollm2-135m-instruct", device="cpu", quantization_config=object())


def test_what_counts_as_out_of_memory() -> None:
    assert exhausted(torch.OutOfMemoryError("CUDA out of memory."))
    assert exhausted(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not exhausted(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_budget_is_never_below_one_example() -> None:
    budget = Budget(1000)
    with pytest.warns(RuntimeWarning, match="done again with 700"):
        budget.halve(longest=700)
    with pytest.raises(MemoryError, match="Lower max_length"):
        budget.halve(longest=700)
