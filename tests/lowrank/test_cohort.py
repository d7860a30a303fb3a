"""Gram matrix of a cohort."""

from __future__ import annotations

import pytest
import torch
from lowrank.spectra import trained

from flexlora.lowrank import LowRank, gram, inner


@pytest.mark.parametrize("ranks", [[2, 3, 1], [20, 25, 30, 8]])
def test_equals_all_inner_products(ranks):
    """From factors where they are small, from dense rows where they are not."""
    terms = trained(31, 40, ranks)
    G = gram(terms)
    for i, x in enumerate(terms):
        for j, y in enumerate(terms):
            assert G[i, j] == pytest.approx(inner(x, y), rel=1e-10)
    assert G.dtype == torch.float64


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        gram(
            [
                LowRank(torch.ones(2, 1), torch.ones(1, 3)),
                LowRank(torch.ones(3, 1), torch.ones(1, 3)),
            ]
        )
