"""LoRA dropout without a generator: every mask bit is a hash of what it belongs to.

A mask drawn from a generator depends on everything drawn before it, so it would change with the
grouping of clients and could not be replayed by gradient checkpointing. Here bit `j` of token `t`
at a module is a function of `(seed, client, round, step, example, module, t, j)` alone, the same on
every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexlora.adapter import stable_seed

# splitmix64's constants (Steele, Lea, Flood, OOPSLA 2014), as signed integers; products wrap.
_GAMMA, _MIX1, _MIX2 = (
    c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser with arithmetic shifts: avalanche over 64 bits."""
    z = (z ^ (z >> 30)) * _MIX1
    z = (z ^ (z >> 27)) * _MIX2
    return z ^ (z >> 31)


@dataclass(frozen=True, eq=False)
class Dropout:
    """The probability, and one key per token of the batch.

    Attributes:
        p: share of inputs set to zero, in `[0, 1)`; the others are divided by `1 - p`.
        keys: `(tokens,)`, a 63-bit key per token, see :meth:`for_examples`.
    """

    p: float
    keys: Int[Tensor, " tokens"]

    @classmethod
    def for_examples(
        cls, p: float, seeds: list[int], lengths: list[int], device: torch.device | str
    ) -> Dropout:
        """Keys for examples laid end to end, each with a seed of its own."""
        parts = [
            seed + _GAMMA * torch.arange(1, n + 1) for seed, n in zip(seeds, lengths, strict=True)
        ]
        return cls(p, _mix(torch.cat(parts)).to(device))

    def apply(self, x: Float[Tensor, "tokens d"], module: str) -> Float[Tensor, "tokens d"]:
        """`x` with a share `p` of its entries zeroed and the rest scaled up.

        >>> x = torch.ones(100, 100)
        >>> drop = Dropout.for_examples(0.25, [1, 2], [40, 60], "cpu")
        >>> y = drop.apply(x, "q_proj")
        >>> torch.equal(y, drop.apply(x, "q_proj")), round((y == 0).float().mean().item(), 1)
        (True, 0.2)
        """
        columns = _GAMMA * torch.arange(1, x.shape[1] + 1, device=x.device)
        bits = _mix((self.keys + stable_seed(module))[:, None] ^ columns)
        keep = (bits & 0xFFFFFF) >= int(self.p * (1 << 24))
        return x * keep.to(x.dtype) / (1 - self.p)
