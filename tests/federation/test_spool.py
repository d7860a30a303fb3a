"""The spool: the same updates whatever the budget and the order of arrival."""

from __future__ import annotations

import pytest
import torch

from flexlora.federation.spool import Spool
from flexlora.federation.state import Update, iterate
from flexlora.lowrank import LowRank


def update(client: str, examples: int = 10, rank: int = 2, dtype=torch.float32) -> Update:
    g = torch.Generator().manual_seed(ord(client[-1]))
    adapter = {
        m: LowRank(
            torch.randn(5, rank, generator=g).to(dtype),
            torch.randn(rank, 7, generator=g).to(dtype),
            16 / rank,
        )
        for m in ("model.b", "model.a")
    }
    return Update(client, 1, "base", adapter, examples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [0, 200, 10**6])
def test_what_goes_in_comes_out_sorted(tmp_path, budget, dtype):
    with Spool(budget, tmp_path / "spool") as spool:
        for client, examples, rank in (("c", 30, 3), ("a", 10, 1), ("b", 20, 2)):
            spool.add(update(client, examples, rank, dtype))
        assert spool.clients == ("a", "b", "c")
        assert spool.num_examples == (10, 20, 30)
        assert spool.weights == (1 / 6, 1 / 3, 0.5)
        assert spool.modules == ("model.b", "model.a")
        for _ in range(2):
            for module, products in iterate(spool):
                for rank, client, got in zip((1, 2, 3), "abc", products, strict=True):
                    want = update(client, rank=rank, dtype=dtype).adapter[module]
                    assert torch.equal(got.B, want.B)
                    assert torch.equal(got.A, want.A)
                    assert got.B.dtype == dtype
                    assert got.scaling == want.scaling
        on_disk = list(tmp_path.rglob("*.safetensors"))
        assert (len(on_disk) > 0) == (budget < 300)
        assert spool.bytes_in_memory <= budget
    assert not list(tmp_path.rglob("*.safetensors"))
    assert len(spool) == 0


def test_memory_is_its_own(tmp_path):
    bank = torch.ones(5, 2)
    spool = Spool(10**6, tmp_path)
    spool.add(Update("a", 1, "base", {"m": LowRank(bank, torch.ones(2, 7))}, 1))
    bank.zero_()
    assert spool.module("m")[0].B.sum() == 10


@pytest.mark.parametrize("budget", [0, 10**6])
def test_refusals_leave_the_round_intact(tmp_path, budget):
    spool = Spool(budget, tmp_path)
    spool.add(update("a"))
    with pytest.raises(ValueError, match=r"'a'.*already here"):
        spool.add(update("a"))
    with pytest.raises(ValueError, match="num_examples is 0"):
        spool.add(update("b", 0))
    other = {"model.b": update("b").adapter["model.b"]}
    with pytest.raises(ValueError, match=r"model\.a"):
        spool.add(Update("b", 1, "base", other, 1))
    assert spool.clients == ("a",)
