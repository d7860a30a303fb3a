"""The release's JSON files, the natural-instructions repository, and plugins by import path."""

import json
import sys
import types

import pytest

from flexlora.data.load import load_population
from flexlora.data.task import Example, Task


def item(i, **other):
    return {"instruction": "Do.", "input": f"i{i}", "output": f"o{i}", "category": "QA", **other}


@pytest.fixture
def release(tmp_path):
    for client in (10, 9):
        for name, count in (("training", 3), ("eval", 1), ("test", 2)):
            path = tmp_path / f"local_{name}_{client}.json"
            path.write_text(json.dumps([item(i) for i in range(count)]))
    return tmp_path


def test_release_layout(release):
    clients = load_population("release", path=release)
    assert list(clients) == ["9", "10"]
    assert clients["9"].sizes == {"train": 3, "eval": 1, "test": 2}
    assert clients["9"].category == "QA"
    assert clients["10"].load("test")[1] == Example("Do.", "i1", "o1")


def test_release_files_that_may_be_missing(release):
    (release / "local_eval_9.json").unlink()
    (release / "local_test_9.json").write_text(json.dumps([{"instruction": "A", "output": "b"}]))
    task = load_population("release", path=release)["9"]
    assert task.sizes == {"train": 3, "eval": 0, "test": 1}
    assert task.load("test") == [Example("A", "", "b")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"instruction": "a", "outp', r"local_training_9.json: not valid JSON.*cut off"),
        ('{"instruction": "a"}', "expected a list of objects, found dict"),
        ('[{"instruction": "a", "answer": "b"}]', "entry 0: keys instruction, answer; expected"),
        ('[{"instruction": "a", "output": ""}]', "entry 0: empty output.*empty_answers: drop"),
        ("[]", "1 of 2 clients have no training example: 9"),
    ],
)
def test_release_files_that_are_wrong(release, content, message):
    (release / "local_training_9.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_population("release", path=release)


def test_release_empty_answers_can_be_dropped(release):
    (release / "local_training_9.json").write_text(json.dumps([item(0), item(1, output=" ")]))
    assert load_population("release", path=release, empty_answers="drop")["9"].sizes["train"] == 1


def test_release_folder_without_its_files(tmp_path):
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no local_training_K.json; it has other.txt"):
        load_population("release", path=tmp_path)


def ni_task(instances):
    return {
        "Definition": ["Answer the question."],
        "Categories": ["Question Answering"],
        "Instances": [{"input": f"q{i}", "output": [f"a{i}", "b"]} for i in range(instances)],
    }


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "tasks").mkdir()
    for name, instances in (("task001_one", 1000), ("task002_two", 60)):
        (tmp_path / "tasks" / f"{name}.json").write_text(json.dumps(ni_task(instances)))
    return tmp_path


def test_natural_instructions_takes_ten_percent_eighty_ten_ten(repository):
    clients = load_population("natural-instructions", path=repository)
    task = clients["task001_one"]
    assert task.sizes == {"train": 80, "eval": 10, "test": 10}
    assert task.category == "Question Answering"
    assert clients["task002_two"].sizes == {"train": 4, "eval": 1, "test": 1}
    examples = [e for split in task.sizes for e in task.load(split)]
    assert len({e.input for e in examples}) == 100
    assert all(e.output == "a" + e.input[1:] for e in examples)
    assert {e.instruction for e in examples} == {"Answer the question."}


def test_natural_instructions_fractions_and_seed(repository):
    settings = {"fraction": 1.0, "sharing": {"eval": 0.0, "test": 0.5}}
    task = load_population("natural-instructions", path=repository, **settings)["task001_one"]
    assert task.sizes == {"train": 500, "eval": 0, "test": 500}
    one, same, other = (
        load_population("natural-instructions", path=repository / "tasks", sharing={"seed": seed})[
            "task001_one"
        ].load("train")
        for seed in (0, 0, 1)
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "task001_one.json: not valid JSON"),
        ("[]", "no Definition, Categories, Instances"),
        (json.dumps({"Definition": "x", "Categories": []}), "no Instances"),
        (json.dumps({**ni_task(0), "Instances": [{"input": "x"}]}), "instance 0: expected input"),
        (json.dumps(ni_task(0)), "no training example: task001_one"),
        (
            json.dumps({**ni_task(0), "Instances": [{"input": "x", "output": [""]}]}),
            "instances 0 have an empty output",
        ),
    ],
)
def test_natural_instructions_tasks_that_are_wrong(repository, content, message):
    (repository / "tasks" / "task001_one.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_population("natural-instructions", path=repository)


def test_natural_instructions_elsewhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tasks/\*.json"):
        load_population("natural-instructions", path=tmp_path)


@pytest.fixture
def plugin():
    """A module of a user's own."""
    module = types.ModuleType("my_clients")
    one = Task("a", "t", "c", {"train": 1, "eval": 0, "test": 0}, lambda split: [])
    module.make = lambda count=1: {"a": one} if count else {}
    module.wrong = lambda: {"b": one}
    module.number = 3
    sys.modules["my_clients"] = module
    yield module
    del sys.modules["my_clients"]


def test_a_plugin_makes_the_population(plugin):
    assert list(load_population("my_clients:make", count=1)) == ["a"]


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"),
    [
        ("my_clients:make", {"cuont": 1}, ValueError, "did you mean 'count'"),
        ("my_clients:make", {"count": 0}, ValueError, "returned dict; expected a mapping"),
        ("my_clients:wrong", {}, ValueError, "client 'b'.*whose id is that key"),
        ("my_clients:mkae", {}, ImportError, r"no function 'mkae' \(did you mean 'make'"),
        ("my_clients:number", {}, ImportError, "no function 'number'"),
        ("no_such_module:make", {}, ImportError, "'no_such_module' cannot be imported.*PYTHONPATH"),
        ("parquett", {}, ValueError, r"'parquett' is unknown \(did you mean 'parquet'\?\)"),
        ("parquet", {}, ValueError, "path: not set"),
    ],
)
def test_kinds_that_lead_nowhere(plugin, kind, settings, error, message):
    with pytest.raises(error, match=message):
        load_population(kind, **settings)
