"""What is said of a run before it starts, from the configuration of the model alone."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from experiment.small import write_config

from flexlora.experiment import forecast, plan, validate
from flexlora.experiment.errors import Failure
from flexlora.experiment.load import load_config
from flexlora.training.memory import Size, peak_bytes
from flexlora.training.models import outline


@pytest.fixture
def no_weights(tmp_path, tiny_model_dir):
    """The tiny model's folder without its weights."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    return folder


def test_memory_is_what_peak_bytes_predicts(tmp_path, no_weights):
    config = load_config(write_config(tmp_path, no_weights, lora={"r": 4}))
    found = plan.make_plan(config)
    model, held = outline(str(no_weights)), found["memory_bytes"]
    level = found["levels"]["4"]["trainable_parameters"]
    e = plan.build(config, model.shapes)
    mean = forecast.lengths(e)
    tokens = round(2 * 2 * mean.tokens)  # two clients, two examples each
    labels = round(tokens * mean.labels / mean.tokens)
    wanted = peak_bytes(Size.of(model.config), 4, [level] * 2, tokens, labels)
    assert held == {
        "base": 4 * model.parameters, **wanted,
        "peak": 4 * model.parameters + sum(wanted.values()),
    }  # fmt: skip


def test_group_and_budget_bound_what_is_predicted(tmp_path, no_weights):
    path = write_config(tmp_path, no_weights, lora={"r": 4})
    whole = plan.make_plan(load_config(path))["memory_bytes"]
    words = ["--training.group_size", "1"]
    alone = plan.make_plan(load_config(path, words))["memory_bytes"]
    assert 2 * alone["clients"] == whole["clients"]
    assert alone["activations"] == pytest.approx(whole["activations"] / 2, rel=0.1)


def test_time_covers_training_and_evaluation(tmp_path, no_weights, monkeypatch):
    monkeypatch.setattr(plan, "matmul_speed", lambda *_: 1e9)
    path = write_config(tmp_path, no_weights)

    def took(*words):
        return plan.make_plan(load_config(path, words))["seconds"]

    found = took()
    parts = 2 * (found["training_per_round"] + found["server_per_round"])
    assert found["total"] == pytest.approx(parts + found["evaluation"])
    assert 0 < took("--evaluation.every", "0")["evaluation"] < found["evaluation"]
    assert took("--evaluation.max_clients", "1")["evaluation"] < found["evaluation"]
    twice = took("--training.max_steps", "2")
    assert twice["training_per_round"] == pytest.approx(2 * found["training_per_round"])
    monkeypatch.setattr(plan, "matmul_speed", lambda *_: 2e9)
    assert took()["evaluation"] == pytest.approx(found["evaluation"] / 2)


def test_evaluations_count_what_a_run_measures(tmp_path, tiny_model_dir):
    config = load_config(write_config(tmp_path, tiny_model_dir))
    e = plan.build(config, outline(str(tiny_model_dir)).shapes)
    work = forecast.evaluations(e, forecast.Lengths(tokens=10.0, labels=4.0))
    test, own, fixed = 6 * 2, 4 * 2, 6 * 2  # clients times examples
    asked, shown = 6 * 1, 2 * 1  # answers generated to be measured; to be shown
    assert work.read == 10 * (2 * test + own + 3 * fixed + shown) + 2 * asked * 6
    assert work.written == (2 * asked + shown) * 3  # three tokens


def test_tokens_of_a_round_are_those_trained_on(tmp_path, tiny_model_dir):
    from flexlora import cli

    path = write_config(tmp_path, tiny_model_dir)
    cli.main(["run", str(path), "--output_dir", str(tmp_path / "run"), "--format", "json"])
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rounds = [x for x in lines if x["kind"] == "round"]
    tokens = sum(r["metrics"]["tokens"] for x in rounds for r in x["clients"].values())
    planned = plan.make_plan(load_config(path))["tokens_per_round"]
    assert planned == pytest.approx(tokens / len(rounds), rel=0.1)


@pytest.mark.parametrize("check", [plan.make_plan, validate.check])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model.load_in_4bit", "true"], "needs a GPU"),
        (["--report_to", "[trackio]"], "'trackio' is not installed"),
    ],
)
def test_what_would_stop_the_run_is_told_before(tmp_path, no_weights, check, words, told):
    with pytest.raises(Failure, match=told):
        check(load_config(write_config(tmp_path, no_weights), words))


@pytest.mark.parametrize(
    ("method", "told"),
    [("flora", "bytes down are those of round 1"), ("local-only", "sends nothing")],
)
def test_bytes_that_a_first_round_does_not_show_are_named(tmp_path, no_weights, method, told):
    path = write_config(tmp_path, no_weights, method={"name": method})
    assert told in plan.describe(plan.make_plan(load_config(path)))


def test_validate_deals_out_the_ranks_without_weights(tmp_path, no_weights):
    found = validate.check(load_config(write_config(tmp_path, no_weights)))
    assert found["ranks"] == {"2": 3, "4": 1}
    assert "clients per rank: 3 at 2, 1 at 4; they fit all" in validate.describe(found)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method.name", "flexlor"], "did you mean 'flexlora'"),
        (["--lora.r", "heavy-tail"], "unknown distribution 'heavy-tail'"),
        (["--lora.r", "uniform"], "The largest that fits them all is 32"),
        (["--federation.clients_per_round", "9"], "only 4 clients"),
    ],
)
@pytest.mark.parametrize("look", [validate.check, plan.make_plan])
def test_what_would_stop_a_run_stops_them(tmp_path, no_weights, look, words, told):
    path = write_config(tmp_path, no_weights)
    with pytest.raises(Failure, match=told) as caught:
        look(load_config(path, words))
    assert caught.value.code == 2


def test_a_run_refuses_ranks_before_it_loads_weights(tmp_path, no_weights):
    from flexlora.experiment.console import Console
    from flexlora.experiment.workshop import open_workshop

    config = load_config(write_config(tmp_path, no_weights), ["--lora.r", "99"])
    with pytest.raises(Failure, match=r"k_proj.*The largest that fits them all is"):
        open_workshop(config, tmp_path, Console(io.StringIO()))
