"""A sum formed on a CPU's bfloat16 matrix units, and what the rounding costs, measured."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from flexlora.lowrank.estimate import Triples
from flexlora.lowrank.operators import DenseMatrix, Sum

PROBES = 8
"""Gaussian rows that measure the rounding, and found directions that it is measured in."""

HEAD = 8
"""First rows of each term that are not rounded."""

ROWS = 512
"""Terms are concatenated to about this many: fewer spend their time on adding to the sum."""


def has_fast_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether float32 products run faster with their factors rounded to bfloat16: on AMX."""
    return dtype == torch.float32 and device.type == "cpu" and _has_matrix_units()


@functools.cache
def _has_matrix_units() -> bool:
    if not (hasattr(torch.cpu, "get_capabilities") and hasattr(torch.backends.mkldnn, "matmul")):
        return False  # a torch that cannot be asked
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def rounded_sum(total: Sum) -> DenseMatrix:
    """The sum, the factors rounded to bfloat16 but for the first `HEAD` rows of each term.

    Products add up in float32. The first rows of an adapter that was cut from a factorisation hold
    its strongest directions: rounded, they would cost more than all the others.
    """
    formed = total.part(slice(0, HEAD)).merged(ROWS).dense()
    rest = total.part(slice(HEAD, None))
    if rest.modules[0]:
        with _fast_products():
            rest.merged(ROWS).add_to_(formed.D)
    return formed


@contextmanager
def _fast_products() -> Iterator[None]:
    """Sets `torch.backends.mkldnn.matmul.fp32_precision`, for all of the process, and back."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def with_rounding(found: Triples, total: Sum, rounded: DenseMatrix, seed: int) -> Triples:
    """`found` of `rounded`, judged as triples of `total`; multiplies both with 16 rows.

    Gaussian rows measure `||total - rounded||_F^2`; the last right vectors, by how much the
    weakest pairs are off.
    """
    modules, _, d_in = total.shape
    generator = torch.Generator().manual_seed(seed + 1)
    fresh = torch.randn(PROBES, d_in, generator=generator).to(found.Vh)
    X = torch.cat([fresh.expand(modules, PROBES, d_in), found.Vh[:, -PROBES:]], 1)
    wrong = (total.apply(X) - rounded.apply(X)).double()
    estimate = replace(
        found.estimate,
        rounding=wrong[:, :PROBES].square().sum((1, 2)) / PROBES,
        tilt=wrong[:, PROBES:].norm(dim=2) / found.S[:, -PROBES:].double().clamp_min(1e-300),
    )
    return replace(found, estimate=estimate, applies=found.applies + X.shape[1])
