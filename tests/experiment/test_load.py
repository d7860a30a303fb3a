"""YAML and overrides into a configuration; every mistake is named with its place."""

import dataclasses
import json
from pathlib import Path

import pytest

from flexlora.experiment.build import cohort_size
from flexlora.experiment.config import Config, Training
from flexlora.experiment.errors import Failure
from flexlora.experiment.load import load_config, recipes
from flexlora.experiment.runs import create, open_run
from flexlora.training.client import LocalTraining


@pytest.fixture
def write(tmp_path: Path):
    def writing(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return writing


@pytest.mark.parametrize("number", ["5e-5", "5.0e-5", "0.00005", "+5E-05"])
def test_numbers_as_people_write_them(write, number):
    path = write(f"training:\n  learning_rate: {number}\n")
    assert load_config(path).training.learning_rate == 5e-5


def test_overrides_win_and_are_read_as_yaml(write):
    path = write("training:\n  learning_rate: 1.0\nfederation: {rounds: 3}\n")
    words = [
        "--training.learning_rate",
        "5e-5",
        "--lora.r={8: 0.8, 32: 0.2}",
        "--report_to=[wandb]",
    ]
    config = load_config(path, words)
    assert config.training.learning_rate == 5e-5
    assert config.lora.r == {8: 0.8, 32: 0.2}
    assert config.report_to == ("wandb",)
    assert config.federation.rounds == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("training:\n  learnin_rate: 1\n", ":2: unknown key 'training.learnin_rate'; did you mean"),
        ("lora:\n  lora_alpha: 0\n", ":2: lora.lora_alpha: Input should be greater than 0 (got 0)"),
        ("data:\n  unseen:\n    cont: 3\n", ":3: unknown key 'data.unseen.cont'; did you mean"),
        ("model: {dtype: float12}\n", ":1: model.dtype: Input should be 'auto'"),
        ("federation:\n  setting: cross-silo\n  drop_out: 0.1\n", "nobody drops out"),
        ("lora:\n  r: -1\n", ":2: lora.r: expected whole number at least 1 or text or mapping"),
        (
            "federation: {clients_per_round: 0}\n",
            ":1: federation.clients_per_round: expected whole number at least 1 or number above 0 "
            "and at most 1 or nothing (got 0).",
        ),
        ("federation: {clients_per_round: 1.5}\n", "at least 1 or number above 0 and at most 1"),
        ("training: {group_size: all}\n", "expected whole number at least 1 or `auto` (got 'all')"),
        ("method: {splt: A}\n", ":1: unknown key 'method.splt'; did you mean 'split'?"),
        ("data: {famlies: []}\n", ":1: unknown key 'data.famlies'; did you mean 'families'?"),
        ("data: {templte: chat}\n", ":1: unknown key 'data.templte'; did you mean 'template'?"),
        ("lora: {r: 4}\nlora: {r: 8}\n", ":2: lora is set twice"),
        ("lora: [\n", "not readable as YAML"),
        ("- 1\n", "holds a list"),
    ],
)
def test_mistakes_say_what_where_and_what_was_expected(write, text, told):
    with pytest.raises(Failure) as caught:
        load_config(write(text))
    assert told in str(caught.value)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lora.alpah", "1"], "--lora.alpah: unknown key 'lora.alpah'"),
        (["--lora.lora_alpha", "0"], "^--lora.lora_alpha: Input should be greater than 0"),
        (["--lora.r", "0"], "^--lora.r: expected whole number at least 1"),
        (["--lora.r"], "--lora.r: no value"),
        (["oops"], "unexpected argument 'oops'"),
    ],
)
def test_override_mistakes(write, words, told):
    with pytest.raises(Failure, match=told):
        load_config(write(""), words)


def test_missing_file_names_the_recipes():
    with pytest.raises(Failure, match="did you mean 'quickstart'"):
        load_config("quickstrat")
    assert "quickstart" in recipes()


@pytest.mark.parametrize(("written", "clients"), [("1", 1), ("1.0", 20), ("0.25", 5), ("20", 20)])
def test_one_is_a_client_and_one_point_nothing_is_everybody(written, clients):
    config = load_config("quickstart", ["--federation.clients_per_round", written])
    assert cohort_size(config, 20) == clients


@pytest.mark.parametrize("words", [[], ["--lora.r={8: 0.8, 32: 0.2}"], ["--lora.r=[4, 8]"]])
def test_resolved_configuration_is_read_back_the_same(tmp_path, words):
    config = load_config("quickstart", [*words, "--output_dir", str(tmp_path / "run")])
    folder = create(config, "quickstart")
    saved = open_run(folder)
    assert "output_dir" not in (folder / "config.yaml").read_text()
    assert saved == config.model_copy(update={"output_dir": None})


def test_every_field_is_described_in_the_schema():
    schema = Config.model_json_schema()
    json.dumps(schema)
    for name, section in schema["$defs"].items():
        for key, field in section["properties"].items():
            assert field.get("description"), f"{name}.{key} has no description"


def test_training_section_is_what_the_local_loop_takes():
    engine_side = {"max_length", "train_on_prompt"}
    loop_side = {"lora_dropout"}
    fields = {f.name for f in dataclasses.fields(LocalTraining)}
    assert set(Training.model_fields) - engine_side == fields - loop_side
    defaults = LocalTraining()
    for name in fields - loop_side - {"optimizer"}:
        assert Training.model_fields[name].default == getattr(defaults, name)
