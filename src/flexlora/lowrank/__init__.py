"""Linear algebra on products of factors; knows nothing of clients."""

from flexlora.lowrank.decompose import complete_rows, svd, svd_sum
from flexlora.lowrank.mask import Mask
from flexlora.lowrank.product import LowRank, Split, hand_out, index_mean, inner, norm, owned, stack

__all__ = [
    "LowRank",
    "Mask",
    "Split",
    "complete_rows",
    "hand_out",
    "index_mean",
    "inner",
    "norm",
    "owned",
    "stack",
    "svd",
    "svd_sum",
]
