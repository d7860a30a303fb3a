"""A comparison on the tiny model: fair, resumable cell by cell, honest about what it cannot say."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from experiment.small import settings, write_data

from flexlora import cli
from flexlora.experiment.compare import cells
from flexlora.experiment.compare import run as comparing
from flexlora.experiment.compare.grid import arms, configure, load_comparison
from flexlora.experiment.compare.results import read_cells
from flexlora.experiment.errors import RUN, Failure
from flexlora.experiment.load import comparisons
from flexlora.experiment.runs import read_metrics

TASKS = (
    "double",
    "negate",
    "triple",
    "square",
    "halve",
    "repeat",
    "twice",
    "half",
    "invert",
    "add",
)


def write(folder, model, **more):
    """A comparison of two methods at two plans; fedsa-lora is refused, cross-device."""
    data = write_data(folder / "data.jsonl", TASKS)
    run = settings(
        model,
        data,
        data={"unseen": {"clients": list(TASKS[4:])}},
        lora={"types": [2, 4]},
        evaluation={"metrics": ["loss"], "samples": 0},
    )
    spec = {
        "run": run,
        "methods": {"flexlora": {}, "fedit": {}, "fedsa-lora": {}},
        "ranks": {"tail": {2: 0.75, 4: 0.25}, "homogeneous": "homogeneous"},
        "grid": [
            {"methods": ["flexlora"]},
            {"methods": ["fedit", "fedsa-lora"], "ranks": ["homogeneous"]},
        ],
        "seeds": [0],
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(spec | more, sort_keys=False))
    return path


def call(*words) -> int:
    try:
        cli.main([str(w) for w in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_model_dir):
    """A finished comparison; read only."""
    folder = tmp_path_factory.mktemp("comparison")
    path = write(folder, tiny_model_dir, seeds=[0, 1, 2])
    assert call("compare", path, "--output_dir", folder / "out", "--format", "json") == 0
    return folder / "out"


def test_every_cell_is_a_run_and_the_tables_tell_all(done):
    names = {p.name for p in (done / "cells").iterdir()}
    assert len(names) == 9
    assert "flexlora_tail_lr0.01_seed2" in names
    found = json.loads((done / "comparison.json").read_text())
    assert [row["arm"] for row in found["arms"]] == [
        "flexlora/tail", "flexlora/homogeneous", "fedit/homogeneous"]  # fmt: skip
    assert found["group"] == "unseen"
    assert len(found["verdicts"]) == 2
    assert all(v["seeds"] == 3 and v["clients"] == 6 and v["p"] for v in found["verdicts"])
    assert "cross-silo" in found["refused"]["fedsa-lora/homogeneous"]
    for row in found["arms"]:
        assert row["bytes_up"] > 0
        assert row["flops"] > 0
        assert set(row["means"]) == {"global", "exported", "own"}
        assert row["means"]["exported"]["unseen"]["loss"] > 0
    tail, homogeneous = found["arms"][:2]
    assert tail["peak_client_bytes"] > homogeneous["peak_client_bytes"]
    rows = list(csv.DictReader((done / "comparison.csv").read_text().splitlines()))
    assert {r["view"] for r in rows} == {"global", "exported", "own"}
    text = (done / "comparison.md").read_text()
    assert "fedit/homogeneous:" in text
    assert "is refused" not in text
    assert "## Refused" in text


def test_equal_by_construction(done):
    """Same cohorts, same first loss, same evaluated clients for every arm under one seed."""
    by_seed = {}
    for cell in read_cells(done):
        metrics = read_metrics(cell.folder)
        rounds = [tuple(m["clients"]) for m in metrics if m["kind"] == "round"]
        base = metrics[0]["unseen"]["each"]
        by_seed.setdefault(cell.seed, []).append((rounds, base))
    assert len(by_seed) == 3
    for rows in by_seed.values():
        assert all(row == rows[0] for row in rows)
    assert len({str(rows[0][0]) for rows in by_seed.values()}) > 1


def test_initial_factors_are_prefixes_of_each_other(tiny_model_dir, tmp_path):
    from flexlora.adapter import initial_adapter

    small, large = (initial_adapter({"q": (32, 48)}, {"q": r}, seed=5)["q"] for r in (4, 24))
    assert (large.A[:4] == small.A).all()


def test_a_grown_grid_runs_only_what_is_new(tmp_path, tiny_model_dir, monkeypatch):
    path, out = write(tmp_path, tiny_model_dir), tmp_path / "out"
    assert call("compare", path, "--output_dir", out) == 0
    before = {p: p.stat().st_mtime_ns for p in (out / "cells").rglob("*") if p.is_file()}
    loads = []
    from flexlora.experiment import workshop

    real = workshop.load_base
    monkeypatch.setattr(workshop, "load_base", lambda *a: loads.append(1) or real(*a))
    path = write(tmp_path, tiny_model_dir, seeds=[0, 1])
    assert call("compare", path, "--output_dir", out) == 0
    assert len(loads) == 1
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(read_cells(out)) == 6


def test_the_bounds_stand_beside_the_methods(tmp_path, tiny_model_dir):
    bounds = {"flexlora": {}, "centralised": {}, "local-only": {}}
    path = write(tmp_path, tiny_model_dir, methods=bounds, grid=[{"ranks": ["tail"]}])
    assert call("compare", path, "--output_dir", tmp_path / "out", "--format", "json") == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    flops = {row["arm"]: row["flops"] for row in found["arms"]}
    assert flops.keys() == {f"{name}/tail" for name in bounds}
    assert all(0.5 < told / flops["flexlora/tail"] < 2 for told in flops.values())


def test_a_cell_that_stops_leaves_the_others(tmp_path, tiny_model_dir, monkeypatch, capsys):
    path = write(tmp_path, tiny_model_dir)
    real = cells.start

    def stop(config, name, *more):
        if name.startswith("flexlora_homogeneous"):
            raise Failure("writing: the disk is full", RUN)
        return real(config, name, *more)

    monkeypatch.setattr(cells, "start", stop)
    words = ("compare", path, "--output_dir", tmp_path / "out", "--format", "json")
    assert call(*words) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "under seed 0: writing: the disk" in found["refused"]["flexlora/homogeneous at 0.01"]
    assert "no loss at any learning rate" in found["refused"]["flexlora/homogeneous"]
    assert [row["arm"] for row in found["arms"]] == ["flexlora/tail", "fedit/homogeneous"]
    monkeypatch.setattr(cells, "start", lambda *_: stop(None, "flexlora_homogeneous"))
    again = (*words[:2], "--output_dir", tmp_path / "none")
    assert call(*again) == 5
    assert "no cell came to its end" in capsys.readouterr().err
    monkeypatch.undo()
    assert call(*words) == 0  # the same command tries it again
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "flexlora/homogeneous" in [row["arm"] for row in found["arms"]]


def test_other_settings_are_refused(tmp_path, tiny_model_dir, done, capsys):
    path = write(tmp_path, tiny_model_dir)
    words = ["compare", path, "--output_dir", done]
    assert call(*words, "--run.federation.rounds", 3) == 5
    assert "was made with federation {'rounds': 2}" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("x")
    assert call("compare", path, "--output_dir", tmp_path / "other") == 5
    assert "is not a comparison" in capsys.readouterr().err


def test_killed_and_continued_is_the_same(tmp_path, tiny_model_dir, done):
    out = tmp_path / "killed"
    path = write(tmp_path, tiny_model_dir, seeds=[0, 1, 2])
    command = [sys.executable, "-m", "flexlora", "compare", path, "--output_dir", out]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    while not list(out.glob("cells/*seed0/checkpoints/round-00001")):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (out / "comparison.json").exists()
    assert call("compare", path, "--output_dir", out, "--format", "json") == 0
    one, two = (json.loads((p / "comparison.json").read_text()) for p in (out, done))
    for a, b in zip(one["arms"], two["arms"], strict=True):
        assert (a["arm"], a["means"]) == (b["arm"], b["means"])
    assert one["verdicts"] == two["verdicts"]


def test_one_seed_concludes_nothing_and_rates_are_chosen_on_seen_clients(
    tmp_path, tiny_model_dir, capsys
):
    path = write(tmp_path, tiny_model_dir, learning_rates=[0.001, 0.05])
    assert call("compare", path, "--output_dir", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "1 seed; a conclusion takes at least 3: this grid will describe" in " ".join(
        told.split("\n")
    )
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    assert all("no conclusion: 1 seed" in v["said"] and v["p"] is None for v in found["verdicts"])
    assert {row["learning_rate"] for row in found["arms"]} == {0.05}
    assert len(read_cells(tmp_path / "out")) == 6


BAD = {
    "an unknown method": ({"methods": {"flexlor": {}}, "grid": [{}]}, "did you mean 'flexlora'?"),
    "a seed twice": ({"seeds": [1, 1]}, "[1] repeats"),
    "a label of the grid": ({"grid": [{"ranks": ["tial"]}]}, "did you mean 'tail'?"),
    "a label": ({"ranks": {"a/b": 4}, "grid": [{}]}, "expected letters, digits"),
    "a reference": ({"reference": "flexlora/tall"}, "did you mean 'flexlora/tail'?"),
    "a key of the run": ({"settings": {"x": {"lora.ranke": 4}}}, "unknown key 'lora.ranke'"),
    "a key": ({"sedes": [0]}, "did you mean 'seeds'?"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_grids_are_named_before_anything_runs(tmp_path, tiny_model_dir, case):
    more, told = BAD[case]
    with pytest.raises(Failure) as error:
        load_comparison(write(tmp_path, tiny_model_dir, **more))
    assert told in str(error.value)


def test_a_mixed_plan_under_a_method_for_one_rank_is_refused_with_a_sentence(
    tmp_path, tiny_model_dir, capsys
):
    more = {"methods": {"fedit": {}}, "grid": [{"ranks": ["tail"]}]}
    assert call("compare", write(tmp_path, tiny_model_dir, **more), "--output_dir", "x") == 2
    told = capsys.readouterr()
    assert "needs one rank for everybody" in told.out
    assert "no cell of the grid can run" in told.err


def test_an_unknown_distribution_refuses_its_cells_alone(tmp_path, tiny_model_dir, capsys):
    more = {"ranks": {"tail": "heavy-tail-ligth", "homogeneous": "homogeneous"}}
    out = tmp_path / "out"
    assert call("compare", write(tmp_path, tiny_model_dir, **more), "--output_dir", out) == 0
    found = json.loads((out / "comparison.json").read_text())
    assert "did you mean 'heavy-tail-light'" in found["refused"]["flexlora/tail"]
    assert len(found["arms"]) == 2


def test_overrides_of_one_arm_do_not_reach_another(tmp_path, tiny_model_dir):
    more = {"methods": {"flexlora": {}, "sgd": {"name": "flexlora", "training.optimizer": "sgd"}}}
    comparison = load_comparison(write(tmp_path, tiny_model_dir, grid=[{}], **more))
    configs = [configure(comparison, arm, 0, None).config for arm in arms(comparison)]
    assert [c.training.optimizer for c in configs] == [None, None, "sgd", "sgd"]
    assert [c.lora.r == "homogeneous" for c in configs] == [False, True, False, True]
    again = configure(comparison, arms(comparison)[0], 0, None).config
    assert again == configs[0]


@pytest.mark.parametrize("name", comparisons())
def test_every_shipped_comparison_is_checked(name):
    comparison = load_comparison(name)
    assert len(arms(comparison)) >= 4
    assert comparing.arms(comparison)[0] == arms(comparison)[0]


def test_the_documented_comparison_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs/comparison.md").read_text(encoding="utf-8")
    path = tmp_path / "documented.yaml"
    path.write_text(page.split("```yaml\n")[1].split("```")[0])
    comparison = load_comparison(path)
    assert [str(arm) for arm in arms(comparison)] == [
        "fedit/smallest", "flexlora/light", "flexlora-sgd/light"]  # fmt: skip


def test_a_client_joins_late_another_falls_back_a_third_is_excluded(tmp_path, tiny_model_dir):
    """Through a whole run: the ranks that clients really had, round by round."""
    data = write_data(tmp_path / "data.jsonl", TASKS[:4])
    config = settings(
        tiny_model_dir,
        data,
        data={"unseen": {}},
        lora={"r": 4, "changes": {1: {"double": 0}, 2: {"negate": 2}, 3: {"double": 3}}},
        federation={"rounds": 3, "clients_per_round": 3},
        evaluation={"every": 0, "metrics": ["loss"], "samples": 0},
    )
    (tmp_path / "late.yaml").write_text(yaml.safe_dump(config))
    assert call("plan", tmp_path / "late.yaml") == 0
    assert call("run", tmp_path / "late.yaml", "--output_dir", tmp_path / "run") == 0
    rounds = [m["clients"] for m in read_metrics(tmp_path / "run") if m["kind"] == "round"]
    assert "double" not in rounds[0] | rounds[1]
    assert rounds[0]["negate"]["ranks"] == [4]
    assert rounds[1]["negate"]["ranks"] == [2]
    assert rounds[2].get("double", {"ranks": [3]})["ranks"] == [3]
    words = ["--lora.changes", "{2: {negate: 5}}", "--output_dir", tmp_path / "no"]
    assert call("run", tmp_path / "late.yaml", *words) == 2
