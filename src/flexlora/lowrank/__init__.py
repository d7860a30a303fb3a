"""Linear algebra on products of factors; knows nothing of clients."""

from flexlora.lowrank.decompose import complete_rows, svd, svd_sum
from flexlora.lowrank.product import LowRank, Split, hand_out, inner, norm, stack

__all__ = [
    "LowRank",
    "Split",
    "complete_rows",
    "hand_out",
    "inner",
    "norm",
    "stack",
    "svd",
    "svd_sum",
]
