"""Checkpoints: bit for bit, all or nothing, the last few and the best."""

import json
import shutil

import pytest
import torch

from flexlora.experiment import checkpoints as room
from flexlora.experiment.checkpoints import (
    Progress,
    checkpoints,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from flexlora.experiment.errors import Failure
from flexlora.federation.state import ServerState
from flexlora.lowrank import LowRank


def state_at(round: int) -> ServerState:
    torch.manual_seed(round)
    whole = torch.randn(6, 5)
    G = {"z.last": LowRank(whole[:, :3], torch.randn(3, 4), 0.7), "a": LowRank(whole, whole.T)}
    patch = {"z.last": torch.randn(6, 4), "a": LowRank(torch.randn(6, 2), torch.randn(2, 6), 2.0)}
    aux = {"moments/a": torch.randn(3, dtype=torch.float64), "count": torch.tensor(7)}
    return ServerState(round, "base", G, patch, aux, seed=3, wire="bfloat16")


def same(x, y) -> bool:
    if isinstance(x, LowRank):
        return torch.equal(x.B, y.B) and torch.equal(x.A, y.A) and x.scaling == y.scaling
    return torch.equal(x, y) and x.dtype == y.dtype


def test_round_trip_is_bit_exact_and_keeps_order(tmp_path):
    state, progress = state_at(4), Progress(100, 1.5, 3, 0.25, 1, {"group_size": 2}, {"c": [4]})
    back, told = load_checkpoint(save_checkpoint(tmp_path, state, progress))
    assert told == progress
    assert (back.round, back.base, back.seed, back.wire) == (4, "base", 3, "bfloat16")
    for was, now in ((state.G, back.G), (state.patch, back.patch), (state.aux, back.aux)):
        assert list(was) == list(now)
        assert all(same(was[k], now[k]) for k in was)


def test_half_written_ones_are_not_there(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state_at(1), Progress())
    monkeypatch.setattr(room.os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, state_at(2), Progress())
    assert [p.name for p in checkpoints(tmp_path)] == ["round-00001"]


def test_full_disk_is_told_and_the_one_before_is_intact(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    save_checkpoint(tmp_path, state_at(1), Progress())
    monkeypatch.setattr(room, "save_file", full)
    with pytest.raises(
        Failure, match=r"No space left on device.*intact.*flexlora resume"
    ) as caught:
        save_checkpoint(tmp_path, state_at(2), Progress())
    assert caught.value.code == 5
    assert load_checkpoint(checkpoints(tmp_path)[-1])[0].round == 1
    assert not list(tmp_path.glob(".writing*"))


def test_damage_is_told(tmp_path):
    path = save_checkpoint(tmp_path, state_at(1), Progress())
    with (path / "state.safetensors").open("r+b") as file:
        file.truncate(10)
    with pytest.raises(Failure, match="has 10 bytes, expected"):
        load_checkpoint(path)
    told = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(told | {"format": 99}))
    with pytest.raises(Failure, match="format 99"):
        load_checkpoint(path)


def test_last_few_and_the_best_are_kept(tmp_path):
    for round in range(6):
        save_checkpoint(tmp_path, state_at(round), Progress())
    prune(tmp_path, keep_last=2, best_round=1)
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["1", "4", "5"]
    shutil.rmtree(tmp_path)
