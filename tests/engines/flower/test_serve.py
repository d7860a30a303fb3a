"""The whole server on the in-process grid: greeting, ranks, rounds, resume, the run directory."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

pytest.importorskip("flwr", reason="needs flwr: pip install 'flexlora[flower]'")

from engines.flower.inproc import InProcess

from flexlora import cli
from flexlora.engines.flower.client import make_client_app
from flexlora.engines.flower.grid import Flower
from flexlora.experiment import deployed, runs
from flexlora.experiment.checkpoints import checkpoints, load_checkpoint
from flexlora.experiment.durable import fingerprint
from flexlora.experiment.errors import Failure
from flexlora.experiment.site import answer, open_site
from flexlora.experiment.trackers import flatten
from flexlora.federation import ledger

SITES = {"north": {"rank": 4}, "south": {"rank": 8}, "west": {"memory": "1G"}}


@pytest.fixture
def config(tmp_path, tiny_model_dir) -> Path:
    """One YAML for all: the server reads everything but the data, a node its model and data."""
    rows = [
        {"site": s, "kind": s[::-1], "instruction": f"Say {s}", "input": "", "output": f"{s} {i}"}
        for s in SITES
        for i in range(20)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {"name_or_path": str(tiny_model_dir), "dtype": "float32"},
        "data": {
            "kind": "jsonl",
            "path": str(data),
            "columns": {"client": "site", "category": "kind"},
        },
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


def test_a_run_from_greeting_to_export(tmp_path, config, grid, capsys):
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
        cli.main(words)
        assert told in capsys.readouterr().out
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    people = runs.read(run / "status.json")["clients"]
    assert all(row["bytes_up"] > 0 and row["seconds"] > 0 for row in people.values())


def test_a_server_that_stops_after_a_round_goes_on_to_the_same_state(
    tmp_path, config, grid, monkeypatch, capsys
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
    cli.main(["status", str(tmp_path / "again")])
    status = capsys.readouterr().out
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


def test_status_names_the_round_before_anyone_has_answered(
    tmp_path, config, grid, monkeypatch, capsys
):
    def interrupted(self, payloads, clients):
        raise KeyboardInterrupt

    monkeypatch.setattr(Flower, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deployed.serve(grid, terms(tmp_path, config))
    cli.main(["status", str(tmp_path / "run")])
    assert "running, in round 1" in capsys.readouterr().out


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


def settings(config: Path, **sections) -> None:
    """Change sections of a YAML file in place."""
    found = yaml.safe_load(config.read_text())
    for name, more in sections.items():
        found[name] = {**found.get(name, {}), **more}
    config.write_text(yaml.safe_dump(found))


def last_state(folder: Path):
    return load_checkpoint(checkpoints(folder / "checkpoints")[-1])[0]


def admitted_ranks(folder: Path) -> list[dict]:
    lines = [m for m in runs.read_metrics(folder) if m["kind"] == "round"]
    return [{c: row["ranks"] for c, row in m["clients"].items()} for m in lines]


TYPES = [2, 4, 8, 16]
PLANS = {
    "wish over plan": ({"r": 16}, {"north": 4, "south": 8}, {}),
    "by size": ({"r": "by-size", "types": [2, 4, 8]}, {}, {}),
    "by category": ({"r": "by-category", "types": [2, 4, 8]}, {}, {}),
    "strong of": ({"r": "strong-of-normal", "types": [2, 4, 8, 16]}, {}, {}),
    "per module": ({"r": {"q_proj": 4, "v_proj": 8}}, {}, {}),
    "per type and module": ({"r": "uniform", "types": [2, {"q_proj": 4, "v_proj": 8}]}, {}, {}),
    "client by client": ({"r": {"north": 2, "south": {"q_proj": 4, ".*": 8}, "west": 8}}, {}, {}),
    "changes": ({"r": 8, "changes": {2: {"north": 2}, 3: {"north": 8, "south": 4}}}, {}, {}),
    "one rank": ({"r": {4: 0.5, 8: 0.5}}, {}, {"name": "fedit"}),
    "one rank, uniform": ({"r": "uniform", "types": TYPES}, {}, {"name": "fedit"}),
    "one rank, strong of": ({"r": "strong-of-uniform", "types": TYPES}, {}, {"name": "fedit"}),
    "one rank, mean of": ({"r": "mean-of-uniform", "types": TYPES}, {}, {"name": "fedit"}),
    "one rank, highest of": (
        {"r": "highest-of-heavy-tail-light", "types": TYPES}, {}, {"name": "fedit"},
    ),
    "one rank, no share": ({"r": {4: 0.0, 8: 1.0}}, {}, {"name": "fedit"}),
    "no share": ({"r": {8: 1.0, 16: 0.0}}, {}, {}),
    "mean of": ({"r": "mean-of-uniform", "types": TYPES}, {}, {}),
    "homogeneous": ({"r": "homogeneous", "types": TYPES}, {}, {}),
    "kept factors": ({"r": {"north": 2, "south": 4, "west": 8}}, {}, {"name": "fedsa-lora"}),
}  # fmt: skip


CODED = [("wish over plan", "bfloat16"), ("kept factors", "bfloat16")]


@pytest.mark.parametrize(("plan", "wire"), [*((plan, "float32") for plan in PLANS), *CODED])
def test_the_same_plan_is_the_same_run_on_one_machine_bit_for_bit(
    tmp_path, config, grid, plan, wire
):
    lora, wishes, method = PLANS[plan]
    for i, client in enumerate(SITES):
        found = grid.contexts[100 + i].node_config
        found.pop("rank", None), found.pop("memory", None)
        found.update({"rank": wishes[client]} if client in wishes else {})
    settings(config, lora=lora, federation={"wire": wire, "rounds": 3}, method=method or {})
    settings(config, evaluation={"every": 0}, training={"group_size": 1})
    deployed.serve(grid, terms(tmp_path, config))
    if wishes:
        settings(config, lora={"r": {**dict.fromkeys(SITES, 16), **wishes}})
    embedded = tmp_path / "embedded"
    cli.main(["run", str(config), "--output_dir", str(embedded), "--evaluation.samples=0"])
    ours, theirs = last_state(tmp_path / "run"), last_state(embedded)
    assert admitted_ranks(tmp_path / "run") == admitted_ranks(embedded)
    assert fingerprint(ours) == fingerprint(theirs)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"method": {"name": "local-only"}}, "is no federation"),
        ({"method": {"name": "fedsa-lora"}, "federation": {"setting": "cross-device"}}, "keep"),
        ({"federation": {"setting": "cross-device", "drop_out": 0.5}}, "drop_out"),
        ({"model": {"load_in_4bit": True}}, "fingerprint of its own"),
        ({"checkpoints": {"early_stopping_patience": 2}}, "nothing is measured between rounds"),
        ({"checkpoints": {"load_best_at_end": True}}, "nothing is measured between rounds"),
        ({"lora": {"r": [4, 8, 16]}}, "nobody knows who will come"),
        ({"lora": {"r": "heavy-tail-left", "types": [2, 4, 8, 16]}}, "heavy-tail-left"),
        ({"lora": {"r": {4: 0.5, 8: 0.2}}}, "sum to 1"),
        ({"lora": {"r": 4096}}, "at most"),
        ({"lora": {"r": {"q_proj": 4}}}, "v_proj"),
        ({"lora": {"r": 8, "changes": {2: {"north": 16}}}}, "keeps no more"),
        ({"lora": {"r": 8, "changes": {2: {"a": 4}}}, "method": {"name": "fedavg"}}, "one rank"),
    ],
)
def test_what_is_not_served_is_refused_before_anything_starts(
    tmp_path, config, grid, sections, told
):
    settings(config, **sections)
    with pytest.raises(Failure, match=told) as caught:
        deployed.serve(grid, terms(tmp_path, config))
    assert "\n" not in str(caught.value)
    assert not grid.replies


def test_a_plan_that_names_clients_is_the_list_of_who_takes_part(tmp_path, config, grid, capsys):
    del grid.contexts[101].node_config["rank"]
    plan = {"north": 4, "south": {"q_proj": 4, "v_proj": 8}}
    settings(config, lora={"r": plan}, federation={"rounds": 1})
    settings(config, evaluation={"every": 0})
    deployed.serve(grid, terms(tmp_path, config))
    assert admitted_ranks(tmp_path / "run") == [{"north": [4], "south": [4, 8]}]
    cli.main(["status", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "west: lora.r gives it no rank" in said
    assert re.search(r"south +4-8 +answered", said)


def test_a_node_that_wants_less_than_the_one_rank_is_left_out(tmp_path, config, grid):
    settings(config, lora={"r": 8}, method={"name": "fedit"}, federation={"rounds": 1})
    settings(config, evaluation={"every": 0})
    deployed.serve(grid, terms(tmp_path, config))
    assert admitted_ranks(tmp_path / "run") == [{"south": [8], "west": [8]}]
    assert "it wants rank 4; fedit needs 8" in (tmp_path / "run" / "status.json").read_text()


def test_fewer_nodes_than_a_round_asks_for_are_all_invited(tmp_path, config, grid):
    grid.gone = {101}
    federation = {"setting": "cross-device", "clients_per_round": 3, "rounds": 1}
    settings(config, federation=federation, evaluation={"every": 0})
    deployed.serve(grid, terms(tmp_path, config) | {"min-nodes": 2})
    assert set(admitted_ranks(tmp_path / "run")[0]) == {"north", "west"}


def test_a_plan_without_large_ranks_grants_no_wish_for_one(tmp_path, config, grid):
    settings(config, lora={"r": "homogeneous", "types": TYPES}, evaluation={"every": 0})
    deployed.serve(grid, terms(tmp_path, config))
    assert admitted_ranks(tmp_path / "run")[0] == {c: [2] for c in SITES}


@pytest.mark.parametrize("method", ["flexlora", "fedit"])
def test_a_mean_rank_stays_when_others_come_after_a_restart(
    tmp_path, config, grid, monkeypatch, method
):
    for context in grid.contexts.values():
        context.node_config.pop("rank", None), context.node_config.pop("memory", None)
    settings(config, lora={"r": "mean-of-uniform", "types": TYPES}, method={"name": method})
    settings(config, evaluation={"every": 0})
    real, grid.gone = deployed.rounds, {101}

    def interrupted(server, first):
        yield next(real(server, first))
        raise KeyboardInterrupt

    monkeypatch.setattr(deployed, "rounds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deployed.serve(grid, terms(tmp_path, config) | {"min-nodes": 2})
    monkeypatch.setattr(deployed, "rounds", real)
    grid.gone = set()
    deployed.serve(grid, terms(tmp_path, config))
    first, *later = admitted_ranks(tmp_path / "run")
    assert first == {"north": [10], "west": [10]}
    assert later == [{c: [10] for c in SITES}] * 2


def test_trackers_get_the_rounds_and_the_last_evaluation(tmp_path, config, grid, monkeypatch):
    logged = []

    @contextmanager
    def collecting(names, folder, config):
        yield lambda values, round: logged.append((round, dict(flatten(values))))
        logged.append("closed")

    monkeypatch.setattr(deployed, "trackers", collecting)
    deployed.serve(grid, terms(tmp_path, config))
    *rounds, (last, values), closed = logged
    assert [round for round, _ in rounds] == [1, 2, 3]
    assert (last, closed) == (3, "closed")
    assert "test/global/seen/mean/loss" in values
