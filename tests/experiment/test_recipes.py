"""Every shipped recipe validates, plans, and runs one step on the tiny model."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexlora import cli
from flexlora.experiment.load import comparisons, recipes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def partition(tmp_path_factory) -> Path:
    """Twenty clients in the layout of the release's partition."""
    rows = [
        {"client": str(c), "task": f"task{c}", "category": f"kind {c % 4}", "split": split,
         "instruction": f"Answer in the way of task {c}.", "input": f"number {c} {split} {i}",
         "output": f"{c + i}"}
        for c in range(20) for split, n in (("train", 4), ("eval", 2), ("test", 2))
        for i in range(n)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("data") / "partition.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def words(name: str, model: Path, data: Path) -> list[str]:
    small = {
        "model.name_or_path": model,
        "model.dtype": "float32",
        "model.device": "cpu",
        "lora.types": "[1, 2, 4, 8]",
        "training.max_steps": 1,
        "training.max_length": 200,
        "federation.rounds": 1,
        "federation.clients_per_round": 2,
        "evaluation.max_clients": 1,
        "evaluation.max_examples": 1,
        "evaluation.max_generated": 1,
        "evaluation.max_new_tokens": 2,
        "evaluation.samples": 1,
    }
    if "instructions" in name or name == "released":
        small["data.path"] = data
    return [word for key, value in small.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize("name", recipes())
def test_recipe(name, tiny_model_dir, partition, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = words(name, tiny_model_dir, partition)
    for verb in ("validate", "plan", "run"):
        cli.main([verb, name, *options, "--format", "json"])
        found = json.loads(capsys.readouterr().out)
    assert found["rounds"] == 1
    assert len(found["ranks"]) >= 2


def test_recipes_lie_at_the_root_too():
    assert {p.stem for p in (ROOT / "recipes").glob("*.yaml")} == set(recipes() | comparisons())


def test_the_demo_is_the_quickstart_with_what_the_issue_asks():
    from flexlora.experiment.build import build_population
    from flexlora.experiment.load import load_config

    config = load_config("quickstart")
    _, seen, unseen = build_population(config)
    assert len(seen) >= 16
    assert len(unseen) >= 4
    assert len(config.lora.types) == 4
    assert config.evaluation.samples >= 3
