"""What the command line tells of itself: help, version, the catalogue, words it does not know."""

from __future__ import annotations

import json

import pytest

from flexlora import cli
from flexlora.experiment.errors import EXTRAS, missing
from flexlora.methods import methods


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


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.__name__)
def test_help_of_every_verb_tells_of_every_word(flexlora, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = flexlora(verb.__name__, "--help")
    assert code == 0
    assert verb.__doc__ in out
    for word in cli.VERBS[verb]:
        shown = word.name if word.name.startswith("-") else word.name.upper()
        [line] = [x for x in out.splitlines() if x.startswith(f"  {shown} ")]
        assert word.help in line
        assert word.default is None or f"Default: {word.default}." in line
    assert "\\" not in out
    takes = set(verb.__annotations__) - {"return", "overrides"}
    assert takes == {word.name.lstrip("-") for word in cli.VERBS[verb]}
    assert ("--training.learning_rate" in out) == ("overrides" in verb.__annotations__)


def test_without_a_verb_it_helps(flexlora):
    code, out, err = flexlora()
    assert (code, err) == (0, "")
    assert out == flexlora("--help")[1]
    assert all(f"    {verb.__name__} " in out for verb in cli.VERBS)


def test_version(flexlora):
    from importlib.metadata import version

    assert flexlora("--version") == (0, f"flexlora {version('flexlora')}\n", "")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["expor"], "no verb 'expor'; did you mean 'export'?"),
        (["--foo"], "unknown option '--foo'"),
        (["export", "run"], "the following arguments are required: TO"),
        (["export", "run", "to", "--rank", "x"], "argument --rank: invalid int value: 'x'"),
        (["evaluate", "run", "--split", "tset"], "invalid choice: 'tset'"),
        (["resume", "run", "--lora.r", "4"], "resume takes no '--lora.r 4'"),
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

    from flexlora.experiment import load

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
