"""A random sparse set of entries of a matrix, known from a seed and so never transmitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """`count` entries of a `(d_out, d_in)` matrix, spread evenly and drawn at random.

    The matrix, read row by row, is cut into `count` blocks of nearly equal length and one entry is
    drawn from each: no entry twice, ascending, `O(count)` memory, and every entry at density 1.

    Attributes:
        shape: `(d_out, d_in)`.
        count: entries, 1 to `d_out * d_in`.
        seed: of the draw; the same entries on every machine.

    >>> Mask((2, 3), 6, seed=0).positions().tolist()
    [0, 1, 2, 3, 4, 5]
    >>> Mask((2, 2), 1, seed=0).dense(torch.ones(1)).sum().item()
    1.0
    """

    shape: tuple[int, int]
    count: int
    seed: int

    def __post_init__(self) -> None:
        size = self.shape[0] * self.shape[1]
        if not 1 <= self.count <= size:
            raise ValueError(
                f"Mask.count: {self.count} entries of a {self.shape[0]} x {self.shape[1]} matrix; "
                f"expected 1 to {size}."
            )

    def positions(self) -> Int[Tensor, " count"]:
        """Indices into the flattened matrix, ascending."""
        size = self.shape[0] * self.shape[1]
        edges = torch.arange(self.count + 1, dtype=torch.int64) * size // self.count
        generator = torch.Generator().manual_seed(self.seed)
        draw = torch.rand(self.count, generator=generator, dtype=torch.float64)
        return edges[:-1] + (draw * edges.diff()).long()

    def dense(self, values: Float[Tensor, " count"]) -> Float[Tensor, "d_out d_in"]:
        """The matrix that holds `values` at the positions and zero elsewhere; differentiable."""
        flat = values.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_put((self.positions().to(values.device),), values).view(self.shape)

    def of(self, matrix: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " count"]:
        """The matrix's values at the positions: `mask.dense` backwards."""
        return matrix.flatten()[self.positions().to(matrix.device)]
