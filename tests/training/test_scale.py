"""A registry of 100,000 clients costs a round nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from bank_cases import base_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from scale import cost


def test_a_round_does_not_grow_with_the_population() -> None:
    base = base_of(torch.float32)
    small, large = cost(base, 1_000, 4, rounds=1), cost(base, 100_000, 4, rounds=1)
    assert large.checkpoint_bytes == small.checkpoint_bytes
    assert large.sampling_seconds < 1.0
    assert large.start_seconds < 3.0
    assert large.memory_bytes < 200 << 20  # the clients themselves, 100,000 Python objects
