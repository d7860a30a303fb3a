"""Procedural clients: lazy, the same in every process, nothing shared between splits."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("reasoning_gym", reason="needs flexlora[demo]")

from flexlora.data import reasoning
from flexlora.data.load import load_population
from flexlora.data.reasoning import FAMILIES, IRREPRODUCIBLE

DIGEST = """
import hashlib
from flexlora.data.load import load_population
clients = load_population("reasoning-gym", train=20, eval=3, test=3, seed=5)
examples = [e for task in clients.values() for split in task.sizes for e in task.load(split)]
print(hashlib.sha256(repr([(e.instruction, e.output) for e in examples]).encode()).hexdigest())
"""


def test_the_default_families_are_short_and_nothing_is_in_two_splits():
    clients = load_population("reasoning-gym", train=40, eval=10, test=10)
    assert tuple(clients) == FAMILIES
    assert not set(FAMILIES) & IRREPRODUCIBLE
    assert len({task.category for task in clients.values()}) >= 8
    for task in clients.values():
        parts = [[e.instruction for e in task.load(split)] for split in ("train", "eval", "test")]
        assert [len(p) for p in parts] == [40, 10, 10]
        assert len({text for part in parts for text in part}) == 60
        examples = task.load("train")
        assert sum(len(e.instruction) for e in examples) / 40 < 260
        assert sum(len(e.output) for e in examples) / 40 < 40


def test_every_process_makes_the_same_problems():
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_opening_makes_no_problem_and_loading_makes_them_once(monkeypatch):
    drawn, draw = [], reasoning.draw
    monkeypatch.setattr(
        reasoning, "draw", lambda family, *rest: drawn.append(family) or draw(family, *rest)
    )
    clients = load_population("reasoning-gym", families=["lcm", "gcd"], train=3)
    assert drawn == []
    assert clients["lcm"].load("train") == clients["lcm"].load("train")
    assert clients["lcm"].load("test")
    assert drawn == ["lcm"]


def test_seeds_and_sizes():
    one, other = (load_population("reasoning-gym", families=["lcm"], seed=s)["lcm"] for s in (1, 2))
    assert one.load("train") != other.load("train")
    more = load_population("reasoning-gym", families=["lcm"], seed=1, train=200)["lcm"]
    assert more.load("train")[:128] == one.load("train")


def test_the_family_scores_answers_itself():
    task = load_population("reasoning-gym", families=["complex_arithmetic"])["complex_arithmetic"]
    example = task.load("test")[0]
    assert task.score(f" {example.output}\n", example) == 1.0
    assert task.score("no idea", example) < 0.5


def test_options_reach_the_family():
    clients = load_population(
        "reasoning-gym", families=["chain_sum"], options={"chain_sum": {"max_terms": 2}}
    )
    assert all(
        e.instruction.count(" + ") + e.instruction.count(" - ") == 1
        for e in clients["chain_sum"].load("train")
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"families": ["chain_sun"]}, r"'chain_sun' \(did you mean 'chain_sum'\?\)"),
        ({"families": ["ransom_note"]}, "other problems in every process"),
        ({"families": []}, "families is empty"),
        ({"train": 0}, "train 0"),
        ({"families": ["lcm"], "options": {"gcd": {}}}, "not among the families"),
        ({"families": ["lcm"], "options": {"lcm": {"nmbers": 1}}}, "nmbers"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        load_population("reasoning-gym", **settings)


def test_a_family_without_enough_problems_says_so():
    tiny = {"coin_flip": {"min_trials": 3, "max_trials": 3}}
    task = load_population("reasoning-gym", families=["coin_flip"], options=tiny)["coin_flip"]
    with pytest.raises(
        ValueError, match=r"'coin_flip': only \d+ new problems with an answer for train"
    ):
        task.load("train")


def test_a_family_without_answers_says_so():
    task = load_population("reasoning-gym", families=["rush_hour"], train=1)["rush_hour"]
    with pytest.raises(ValueError, match="only 0 new problems with an answer"):
        task.load("train")
