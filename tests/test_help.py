"""What the command line tells of itself: help, version, the catalogue, words it does not know."""

from __future__ import annotations

import json

import pytest
import typer

from flexlora import cli
from flexlora.experiment.errors import EXTRAS, missing
from flexlora.methods import methods

VERBS = typer.main.get_command(cli.app).commands


@pytest.fixture
def flexlora(capsys):
    def call(*words: str) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main(list(words))
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capsys.readouterr())

    return call


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_tells_of_every_word(flexlora, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = flexlora(verb, "--help")
    assert code == 0
    assert VERBS[verb].help in out
    for word in VERBS[verb].params:
        if word.param_type_name == "argument":  # typer below 0.21 loses their help
            assert word.metavar in VERBS[verb].help
            continue
        [line] = [x for x in out.splitlines() if word.help in x]
        assert word.opts[0] in line
        if word.default and not word.is_flag:
            assert f"[default: {word.default}]" in line
    assert "\\" not in out
    takes = VERBS[verb].context_settings.get("allow_extra_args", False)
    assert ("--training.learning_rate" in out) == takes


def test_without_a_verb_it_helps(flexlora):
    code, out, err = flexlora()
    assert (code, err) == (0, "")
    assert out.split() == flexlora("--help")[1].split()
    assert all(f" {verb} " in out for verb in VERBS)


def test_version(flexlora):
    from importlib.metadata import version

    assert flexlora("--version") == (0, f"flexlora {version('flexlora')}\n", "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["expor"], "No such command 'expor'."),
        (["--foo"], "No such option"),
        (["export", "run"], "Missing argument 'TO'"),
        (
            ["export", "run", "to", "--rank", "x"],
            "Invalid value for '--rank': 'x' is not a valid int",
        ),
        (["evaluate", "run", "--split", "tset"], "'tset' is not one of 'train', 'eval', 'test'"),
        (["resume", "run", "--lora.r", "4"], "No such option"),
        (["methods", "flexlor"], "no method 'flexlor'; did you mean 'flexlora'?"),
    ],
)
def test_words_it_does_not_know(flexlora, words, told):
    code, out, err = flexlora(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert told in err


def test_the_list_of_methods_says_what_is_true_of_each(flexlora):
    out = flexlora("methods")[1]
    assert max(map(len, out.splitlines())) < 120
    lines = {words[0]: words for line in out.splitlines() if (words := line.split())}
    for name, factory in methods.items():
        method = factory()
        yes = ["yes" if v else "no" for v in (method.exact, method.linear, method.stateless)]
        assert lines[name][1:5] == ["mixed" if method.mixed_ranks else "one", *yes]
        assert lines[name][5] == method.trains.split()[0]
    for word in ("mean-of-", "highest-of-", "strong-of-", "heavy-tail-light", "wandb", "jsonl"):
        assert word in out


@pytest.mark.parametrize("name", methods)
def test_one_method_in_full(flexlora, name):
    out = flexlora("methods", name)[1]
    found = json.loads(flexlora("methods", name, "--format", "json")[1])
    flat = " ".join(out.split())
    assert max(map(len, out.splitlines())) < 120
    assert all(" ".join(found[key].split()) in flat for key in ("up", "down", "trains", "citation"))
    assert all(f"{setting} = " in out for setting in found["settings"])
    assert "Raises" not in out


def test_a_bound_is_told_as_one(flexlora):
    assert "a bound, not a method" in flexlora("methods", "local-only")[1]


def test_a_missing_package_is_named_with_its_extra(flexlora, monkeypatch):
    import tomllib
    from pathlib import Path

    from flexlora.experiment import load, run  # noqa: F401, all of it, before it is patched

    def absent(*_):
        raise ModuleNotFoundError("No module named 'flwr'", name="flwr")

    monkeypatch.setattr(load, "load_config", absent)
    code, _, err = flexlora("run", "quickstart")
    assert code == 1
    assert 'pip install "flexlora[flower]"' in err
    project = Path(__file__).parents[1] / "pyproject.toml"
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) <= extras.keys()
    assert missing("numpy") == "Install it: pip install flexlora."
