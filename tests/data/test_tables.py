"""Parquet, JSON Lines and Hub data sets as clients; what is read, and what is refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexlora.data.load import load_population
from flexlora.data.tables import ParquetTable, open_parquet
from flexlora.data.task import Example

ROWS = [
    {
        "client": client,
        "task": f"task{client}",
        "category": "odd" if client % 2 else "even",
        "split": split,
        "instruction": f"Do {client}.",
        "input": f"{split} {i}",
        "output": f"é{i}",
    }
    for client in (7, 2, 30)
    for split, count in (("train", 5), ("eval", 1), ("test", 2))
    for i in range(count)
]


def write(path, rows, kind):
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(params=["parquet", "jsonl"])
def kind(request):
    return request.param


@pytest.fixture
def load(kind, tmp_path):
    """Write rows and open them."""
    return lambda rows, **settings: load_population(
        kind, path=str(write(tmp_path / "data", rows, kind)), **settings
    )


def without(*names):
    return [{k: v for k, v in row.items() if k not in names} for row in ROWS]


def test_clients_as_the_table_names_them(load):
    clients = load(ROWS)
    assert list(clients) == ["7", "2", "30"]
    task = clients["2"]
    assert (task.id, task.task, task.category) == ("2", "task2", "even")
    assert task.sizes == {"train": 5, "eval": 1, "test": 2}
    assert task.load("test") == [
        Example("Do 2.", "test 0", "é0"),
        Example("Do 2.", "test 1", "é1"),
    ]


def test_rows_of_a_client_may_lie_anywhere(load):
    order = np.random.default_rng(0).permutation(len(ROWS))
    clients = load([ROWS[i] for i in order])
    assert sorted(e.input for e in clients["30"].load("train")) == [f"train {i}" for i in range(5)]


def test_other_column_names_and_optional_columns(load):
    rows = [
        {
            "question": f"q{i}",
            "response": f"a{i}",
            "subject": "ab"[i % 2],
            "part": "dev" if i > 7 else "train",
        }
        for i in range(10)
    ]
    names = {"instruction": "question", "output": "response", "task": "subject", "split": "part"}
    clients = load(rows, columns=names)
    assert list(clients) == ["a", "b"]
    assert clients["a"].category == "uncategorized"
    assert clients["b"].load("eval") == [Example("q9", "", "a9")]


def test_without_a_split_column_rows_are_shared_out(load):
    clients = load(without("split"), sharing={"eval": 0.25, "test": 0.25})
    assert clients["7"].sizes == {"train": 4, "eval": 2, "test": 2}
    inputs = [(e.input, e.output) for s in ("train", "eval", "test") for e in clients["7"].load(s)]
    assert sorted(inputs) == sorted((r["input"], r["output"]) for r in ROWS if r["client"] == 7)


@pytest.mark.parametrize(
    "partition",
    [
        {"by": "column", "column": "category"},
        {"by": "iid", "clients": 3},
        {"by": "skewed", "clients": 2, "distribution": "zipf"},
        {"by": "dirichlet", "clients": 2, "alpha": 5, "min_rows": 2},
    ],
)
def test_partitions_hand_out_every_row_once(load, partition):
    clients = load(without("client", "split"), partition=partition, sharing={"seed": 3})
    found = [
        (e.instruction, e.input)
        for task in clients.values()
        for split in task.sizes
        for e in task.load(split)
    ]
    assert sorted(found) == sorted((row["instruction"], row["input"]) for row in ROWS)
    assert all(task.task == "mixed" for task in clients.values() if task.category == "mixed")


def test_empty_answers_are_refused_or_dropped(load):
    rows = [*ROWS[:3], {**ROWS[3], "output": " "}, {**ROWS[4], "output": None}, *ROWS[5:]]
    with pytest.raises(ValueError, match=r"2 of 24 rows have an empty 'output' \(rows 3, 4\)"):
        load(rows)
    assert load(rows, empty_answers="drop")["7"].sizes["train"] == 3


def test_a_client_without_training_examples_is_named(load):
    rows = [row for row in ROWS if not (row["client"] == 30 and row["split"] == "train")]
    with pytest.raises(ValueError, match="1 of 3 clients have no training example: 30"):
        load(rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": {"output": "ouput"}}, r"no column 'ouput' for the output \(did you mean 'out"),
        ({"columns": {"outptu": "x"}}, r"unknown key 'data.columns.outptu'; did you mean 'output'"),
        ({"columns": {"task": "chore"}}, "'chore' for the task.*Its columns: client, task"),
        ({"partition": {"by": "iid"}}, "partition.clients: not set"),
        (
            {"partition": {"by": "iid", "client": 2}},
            r"unknown key 'data.partition.client'; did you mean 'clients'",
        ),
        ({"partition": {"by": "idd"}}, "partition.by: 'idd'; expected 'column'"),
        (
            {"partition": {"by": "column", "column": "tsk"}},
            r"no column 'tsk' \(did you mean 'task'",
        ),
        ({"shards": 3}, "unknown key 'data.shards'; did you mean 'sharing'"),
    ],
)
def test_wrong_settings_are_refused(load, settings, message):
    with pytest.raises(ValueError, match=message):
        load(ROWS, **settings)


def test_nobody_to_give_the_rows_to(load):
    with pytest.raises(ValueError, match=r"no column 'client' or 'task'.*data.partition"):
        load(without("client", "task"))


def test_an_unknown_split_is_refused(load):
    with pytest.raises(ValueError, match="column 'split' has 'trian'; expected train"):
        load([*ROWS, {**ROWS[0], "split": "trian"}])


def test_missing_and_damaged_files(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.*nearest folder there is.*data.path"):
        load_population(kind, path=tmp_path / "absent" / "data")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_population(kind, path=tmp_path)
    whole = write(tmp_path / "whole", ROWS, kind).read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) - 30])
    with pytest.raises(ValueError, match=r"fetch it again|cut off"):
        load_population(kind, path=tmp_path / "cut")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty|complete"):
        load_population(kind, path=tmp_path / "empty")


def test_a_damaged_row_group_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "data"
    path_bytes = bytearray(write(path, ROWS * 200, "parquet").read_bytes())
    table = open_parquet(path)
    path_bytes[100:2000] = b"\xff" * 1900
    path.write_bytes(path_bytes)
    with pytest.raises(ValueError, match=r"row group 0 cannot be read.*fetch it again"):
        table.read([0], ["input"])


def test_opening_reads_no_text_and_loading_reads_its_row_groups_only(tmp_path, monkeypatch):
    table = open_parquet(write(tmp_path / "data", ROWS, "parquet"))
    read = []
    spied = ParquetTable(
        table.source, table.names, table.starts, lambda g, c: read.append(g) or table.group(g, c)
    )
    monkeypatch.setattr("flexlora.data.load.open_parquet", lambda *_: spied)
    clients = load_population("parquet", path="as above")
    assert read == []
    clients["2"].load("train")  # rows 8 to 12, three to a group
    assert read == [2, 3, 4]


def test_hub_data_set_from_a_local_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs flexlora[hub]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "chores"
    folder.mkdir()
    write(folder / "train.parquet", ROWS, "parquet")
    clients = load_population("hub", path=str(folder))
    assert clients["2"].load("test")[1] == Example("Do 2.", "test 1", "é1")
    with pytest.raises(ValueError, match=r"split 'tset'.* cannot be opened"):
        load_population("hub", path=str(folder), split="tset")


def test_hub_without_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "flexlora\[hub\]"'):
        load_population("hub", path="someone/something")
