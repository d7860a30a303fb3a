"""The whole server on the in-process grid: greeting, ranks, rounds, resume, the run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("flwr", reason="needs flwr: pip install 'flexlora[flower]'")

from engines.flower.inproc import InProcess

from flexlora.cli import app
from flexlora.engines.flower.client import make_client_app
from flexlora.engines.flower.grid import Flower
from flexlora.experiment import deployed, runs
from flexlora.experiment.checkpoints import checkpoints, load_checkpoint
from flexlora.experiment.durable import fingerprint
from flexlora.experiment.errors import Failure
from flexlora.experiment.site import answer, open_site
from flexlora.federation import ledger

SITES = {"north": {"rank": 4}, "south": {"rank": 8}, "west": {"memory": "1G"}}


@pytest.fixture
def config(tmp_path, tiny_model_dir) -> Path:
    """One YAML for all: the server reads everything but the data, a node its model and data."""
    rows = [
        {"site": s, "instruction": f"Say {s}", "input": "", "output": f"{s} {i}"}
        for s in SITES
        for i in range(20)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {"name_or_path": str(tiny_model_dir), "dtype": "float32"},
        "data": {"kind": "jsonl", "path": str(data), "columns": {"client": "site"}},
        "lora": {"r": 16, "target_modules": ["q_proj", "v_proj"]},
        "training": {"max_steps": 2, "max_length": 64, "tokens_per_forward": 512},
        "federation": {"setting": "cross-silo", "rounds": 3, "seed": 3},
        "evaluation": {"every": 1, "metrics": ["loss"]},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def grid(tmp_path, config):
    open_site.cache_clear()
    nodes = [
        {"config": str(config), "client": c, "folder": str(tmp_path / c), **more}
        for c, more in SITES.items()
    ]
    return InProcess(make_client_app(answer), nodes)


def terms(tmp_path, config, **more):
    return {
        "config": str(config),
        "output-dir": str(tmp_path / "run"),
        "min-nodes": 3,
        "deadline": 60.0,
        "start-within": 2.0,
        **more,
    }


def test_a_run_from_greeting_to_export(tmp_path, config, grid):
    summary = deployed.serve(grid, terms(tmp_path, config))
    run = tmp_path / "run"
    assert summary["rounds"] == 3
    assert summary["ranks"] == {"north": [4], "south": [8], "west": [16]}
    seen = summary["seen"]
    assert seen["answer_loss_after"] < seen["answer_loss_before"]
    assert ledger.admitted(run / "ledger.jsonl") == dict.fromkeys((1, 2, 3), tuple(SITES))
    assert [m["kind"] for m in runs.read_metrics(run)] == [
        "evaluation", "round", "round", "round", "evaluation",
    ]  # fmt: skip

    for words, told in (
        (["status", str(run)], "finished, 3 of 3 rounds"),
        (["export", str(run), str(tmp_path / "peft"), "--rank", "4"], "rank 4"),
        (["evaluate", str(run)], "seen, mean over clients"),
        (["resume", str(run)], "is finished"),
    ):
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert told in done.output
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()


def test_a_server_that_stops_after_a_round_goes_on_to_the_same_state(
    tmp_path, config, grid, monkeypatch
):
    deployed.serve(grid, terms(tmp_path, config))
    whole, _ = load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    real = deployed.rounds

    def interrupted(server, first):
        yield next(real(server, first))
        raise KeyboardInterrupt

    again = terms(tmp_path, config) | {"output-dir": str(tmp_path / "again")}
    monkeypatch.setattr(deployed, "rounds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deployed.serve(grid, again)
    monkeypatch.setattr(deployed, "rounds", real)
    status = CliRunner().invoke(app, ["status", str(tmp_path / "again")]).output
    assert "not finished, 1 of 3" in status
    assert "north" in status
    deployed.serve(grid, again)
    resumed, _ = load_checkpoint(checkpoints(tmp_path / "again" / "checkpoints")[-1])
    assert fingerprint(resumed) == fingerprint(whole)


def test_a_server_that_stops_within_a_round_asks_only_those_it_lacks(
    tmp_path, config, grid, monkeypatch
):
    deployed.serve(grid, terms(tmp_path, config))
    whole, _ = load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    again = terms(tmp_path, config) | {"output-dir": str(tmp_path / "again")}
    real, asked = Flower.train, []

    def interrupted(self, payloads, clients):
        asked.append(len(payloads))
        for n, found in enumerate(real(self, payloads, clients)):
            if n == 1 and len(asked) == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(Flower, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deployed.serve(grid, again)
    deployed.serve(grid, again)
    assert asked == [3, 2, 3, 3]
    resumed, _ = load_checkpoint(checkpoints(tmp_path / "again" / "checkpoints")[-1])
    assert fingerprint(resumed) == fingerprint(whole)


def test_too_few_nodes_is_an_error_that_says_who_was_turned_away(tmp_path, config, grid):
    grid.contexts[101].node_config["client"] = "north"  # a second node under one name
    with pytest.raises(Failure, match="already connected"):
        deployed.serve(grid, terms(tmp_path, config))


def test_a_node_with_another_model_is_turned_away(tmp_path, config, grid, tiny_tokenizer):
    import tiny

    other = tiny.save(tmp_path / "other", seed=9)
    changed = yaml.safe_load(config.read_text())
    changed["model"]["name_or_path"] = str(other)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(changed))
    grid.contexts[102].node_config["config"] = str(tmp_path / "other.yaml")
    with pytest.raises(Failure, match="its base differs"):
        deployed.serve(grid, terms(tmp_path, config))
