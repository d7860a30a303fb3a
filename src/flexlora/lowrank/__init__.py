"""Linear algebra on products of factors; knows nothing of clients."""

from flexlora.lowrank.cohort import gram
from flexlora.lowrank.cost import Path, choose, cost
from flexlora.lowrank.decompose import (
    Decomposition,
    Options,
    Quality,
    complete_rows,
    decompose,
    decompose_modules,
    svd,
    svd_sum,
)
from flexlora.lowrank.mask import Mask
from flexlora.lowrank.mean import index_mean, norm_weights, owned
from flexlora.lowrank.product import (
    LowRank,
    Split,
    difference,
    hand_out,
    inner,
    merge,
    norm,
    stack,
)
from flexlora.lowrank.sketch import RunningSum, Sketched, running_sum

__all__ = [
    "Decomposition",
    "LowRank",
    "Mask",
    "Options",
    "Path",
    "Quality",
    "RunningSum",
    "Sketched",
    "Split",
    "choose",
    "complete_rows",
    "cost",
    "decompose",
    "decompose_modules",
    "difference",
    "gram",
    "hand_out",
    "index_mean",
    "inner",
    "merge",
    "norm",
    "norm_weights",
    "owned",
    "running_sum",
    "stack",
    "svd",
    "svd_sum",
]
