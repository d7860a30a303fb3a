"""Every example runs, on the tiny model where it needs one."""

import importlib.util
from pathlib import Path

import pytest

from flexlora.adapter import load_peft

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_hand(tmp_path, tiny_model_dir, capsys):
    example("flexlora_by_hand").main()
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.split()[-1]) for line in (lines[0], lines[-1]))
    assert last < first


def quickstart_api(tmp_path, tiny_model_dir, capsys):
    pytest.importorskip("reasoning_gym")
    to = tmp_path / "adapter"
    example("quickstart_api").main(str(tiny_model_dir), to, rounds=2, steps=1)
    printed = capsys.readouterr().out
    assert "[4]" in printed
    assert "[16]" in printed  # ranks really differ
    assert {product.rank for product in load_peft(to).values()} == {16}


RUNS = {"flexlora_by_hand": by_hand, "quickstart_api": quickstart_api}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_runs(path, tmp_path, tiny_model_dir, capsys):
    assert path.stem in RUNS, f"{path.name} needs a test here: every example runs"
    RUNS[path.stem](tmp_path, tiny_model_dir, capsys)
