"""A base in 4 or 8 bits: refused at once where it cannot be. On a GPU it has not been run."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from experiment.small import write_config
from torch import nn

from flexlora import cli
from flexlora.adapter import initial_adapter
from flexlora.experiment.errors import Failure
from flexlora.experiment.load import load_config
from flexlora.training.bank import Bank
from flexlora.training.models import ModelError
from flexlora.training.quantized import quantization


def test_without_a_gpu_it_is_refused_before_anything_is_read(tmp_path, capsys):
    path = write_config(tmp_path, tmp_path / "no-such-model", data={"path": "nowhere"})
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(path), "--model.load_in_4bit", "true"])
    assert stop.value.code == 4
    assert "model.load_in_4bit: needs a GPU; the device is 'cpu'" in capsys.readouterr().err


def test_without_the_package_its_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ModelError, match=r'load_in_8bit: .*pip install "flexlora\[quantized\]"'):
        quantization(8, torch.bfloat16, "cuda")


def test_nothing_is_asked_for_otherwise():
    assert quantization(None, torch.bfloat16, "cpu") == {}


def test_both_at_once_are_refused(tmp_path):
    path = write_config(tmp_path, tmp_path, model={"load_in_4bit": True, "load_in_8bit": True})
    with pytest.raises(Failure, match="both true; set one"):
        load_config(path)


class _Viewing(torch.autograd.Function):
    """Gives a view of what it computed, as bitsandbytes' products do."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return (x.flatten(0, -2) @ weight.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None


class Odd(nn.Linear):
    def forward(self, x):
        return _Viewing.apply(x, self.weight)


@pytest.mark.parametrize("trained_input", [False, True])
def test_a_layer_that_returns_a_view_trains_like_any_other(trained_input):
    torch.manual_seed(0)
    plain, odd = nn.Linear(6, 5, bias=False), Odd(6, 5, bias=False)
    odd.load_state_dict(plain.state_dict())
    x, found = torch.randn(1, 7, 6, requires_grad=trained_input), []
    for layer in (plain, odd):
        model = nn.ModuleDict({"layer": layer}).requires_grad_(False)
        bank = Bank(model, {"layer": (5, 6)}, 1, activations=torch.float32, train="AB")
        slot = bank.load(0, initial_adapter({"layer": (5, 6)}, {"layer": 2}, 0))
        with bank.routed([0], [7]):
            (model["layer"](x) ** 2).sum().backward()
        found.append(slot.grad.clone())
    assert found[0].abs().max() > 0
    assert torch.equal(*found)
