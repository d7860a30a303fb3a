"""PEFT folders of adapters whose modules need unequal ranks."""

from pathlib import Path

import pytest
import torch

from flexlora.adapter import load_peft, save_peft
from flexlora.lowrank import LowRank


def product(d_out: int, d_in: int, rank: int) -> LowRank:
    g = torch.Generator().manual_seed(rank)
    normal = (torch.randn(d_out, rank, generator=g), torch.randn(rank, d_in, generator=g))
    return LowRank(*normal, scaling=0.5)


@pytest.mark.parametrize("rank", [2, 5, 9, 30])
def test_stacks_beyond_a_modules_shape_are_written_at_a_rank_it_can_have(
    tmp_path: Path, rank: int
) -> None:
    adapter = {"a.q": product(12, 9, rank), "a.v": product(4, 9, rank)}
    found = load_peft(save_peft(adapter, tmp_path / "peft"))
    assert {d.rank for d in found.values()} == {min(rank, 9)}
    for module, d in adapter.items():
        torch.testing.assert_close(found[module].dense(), d.dense(), atol=1e-4, rtol=1e-4)


def test_a_rank_no_module_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank 10; no module here can have more than 9"):
        save_peft({"a.q": product(12, 9, 3)}, tmp_path, rank=10)
