"""The engine over a grid: what the embedded engine computes, whoever dies, fails, or is late."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache

import pytest
import tiny
import torch

pytest.importorskip("flwr", reason="needs flwr: pip install 'flexlora[flower]'")

from engines.flower.inproc import InProcess
from federation.quadratic import Quadratic, people, start
from flwr.app import ConfigRecord, Error, RecordDict
from safetensors.torch import load_file

from flexlora.adapter import LoraSpec, initial_adapter, select
from flexlora.data.task import Example, Task
from flexlora.engines.embedded import Embedded, Prompting
from flexlora.engines.flower import node
from flexlora.engines.flower.answers import Coded, encode_update
from flexlora.engines.flower.client import make_client_app
from flexlora.engines.flower.durable import Durable
from flexlora.engines.flower.grid import Flower
from flexlora.engines.flower.messages import Parcel, unpack
from flexlora.engines.flower.roster import checked
from flexlora.engines.flower.wire import decode_payload, digest
from flexlora.federation.admission import Reason
from flexlora.federation.limits import Limits
from flexlora.federation.round import Rules, run_round
from flexlora.federation.spool import Spool
from flexlora.federation.state import Client, ServerState
from flexlora.methods import make
from flexlora.training.client import LocalTraining
from flexlora.training.kept import nested, recall
from flexlora.training.models import as_base

SECRET = "the patient's name is Wilhelmina"
RANKS = {"ann": 4, "bob": 8, "cho": 16}
TARGETS = ("q_proj", "v_proj", "down_proj")
TRAINING = LocalTraining(max_steps=3, tokens_per_forward=512, group_size=1)
PROMPTING = Prompting(max_length=96)


@cache
def base():
    return as_base(tiny.model(), tiny.tokenizer(), "tiny")


def task(client: str, examples: int = 12) -> Task:
    rows = [Example(f"Repeat {client} {i}", "", f"{client} {i} {SECRET}") for i in range(examples)]
    sizes = {"train": examples, "test": 4}
    return Task(
        client, client, "words", sizes, lambda split: rows if split == "train" else rows[:4]
    )


POPULATION = {c: task(c, 12 + 4 * i) for i, c in enumerate(RANKS)}


def shapes():
    return {m: base().shapes[m] for m in select(base().shapes, TARGETS)}


def clients(ranks=RANKS) -> list[Client]:
    return [Client(c, LoraSpec(r, 16), POPULATION[c].sizes["train"]) for c, r in ranks.items()]


def first_state(wire="float32") -> ServerState:
    G = initial_adapter(shapes(), dict.fromkeys(shapes(), 16), 5)
    return ServerState(0, base().fingerprint, G, seed=5, wire=wire)


SETTINGS = {"training": asdict(TRAINING), "prompting": asdict(PROMPTING), "seed": 5}


@pytest.fixture
def grid(tmp_path):
    """Three nodes with the tiny model and text of their own."""

    def answer(config, kind, asked):
        client = config["client"]
        folder = tmp_path / client
        site = node.Site(
            client, base(), POPULATION, folder, config.get("rank"), config.get("memory")
        )
        return node.answer(lambda: site, folder, kind, asked)

    return InProcess(make_client_app(answer), [{"client": c, "rank": r} for c, r in RANKS.items()])


def engine(grid, wire="float32", **more) -> Flower:
    nodes = {c: 100 + i for i, c in enumerate(RANKS)}
    return Flower(grid, nodes, wire, "run", SETTINGS, **{"deadline": 60, "poll": 0.0, **more})


def embedded() -> Embedded:
    return Embedded(base(), POPULATION, TRAINING, 5, PROMPTING)


def play(engine, folder, rounds=2, wire="float32", ranks=RANKS, rules=None, method="flexlora"):
    state, records = make(method).start(first_state(wire)), []
    for _ in range(rounds):
        spool = Spool(1 << 30, folder)
        state, record = run_round(make(method), state, clients(ranks), engine, spool, rules)
        records.append(record)
    return state, records


def same(x: ServerState, y: ServerState) -> bool:
    return all(torch.equal(g.B, y.G[m].B) and torch.equal(g.A, y.G[m].A) for m, g in x.G.items())


def test_a_flower_run_is_the_embedded_run_bit_for_bit(grid, tmp_path):
    ours, records = play(engine(grid), tmp_path)
    reference, _ = play(embedded(), tmp_path)
    assert [set(r.clients) for r in records] == [set(RANKS)] * 2
    assert same(ours, reference)


def test_and_so_it_is_at_bfloat16_with_the_same_codec(grid, tmp_path):
    ours, _ = play(engine(grid, "bfloat16"), tmp_path, wire="bfloat16")
    reference, _ = play(Coded(embedded(), "bfloat16"), tmp_path, wire="bfloat16")
    plain, _ = play(embedded(), tmp_path, wire="bfloat16")
    assert same(ours, reference)
    assert not same(ours, plain)


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_factors_that_stay_at_a_node_are_on_its_disk(grid, tmp_path, wire):
    """FedSA-LoRA: every message finds a fresh engine, and B where the last one left it."""
    ours, _ = play(engine(grid, wire), tmp_path, 3, wire, method="fedsa-lora")
    reference = Coded(embedded(), wire)
    theirs, _ = play(reference, tmp_path, 3, wire, method="fedsa-lora")
    assert same(ours, theirs)
    (own,) = (tmp_path / "ann" / "kept").iterdir()
    assert own.stat().st_mode & 0o077 == 0
    found = nested(load_file(own))["ann"]
    for round, tensors in reference.engine.kept["ann"].items():
        assert all(torch.equal(x, found[round][name]) for name, x in tensors.items())

    method, client = make("fedsa-lora"), clients()[0]
    payload = replace(method.downlink(ours, client), train="")
    wanted = {"split": "test", "metrics": ["loss"], "max_examples": None}
    wanted |= {"max_generated": None, "max_new_tokens": 8}
    (loss, _) = engine(grid, wire).evaluate([payload], wanted)["ann"]
    own_view = recall(reference.engine.kept, payload).adapter
    assert loss == dict(embedded().evaluate({"ann": own_view})["ann"].values)
    assert loss != dict(embedded().evaluate({"ann": payload.adapter})["ann"].values)


def test_a_method_with_one_rank_has_no_use_for_half_of_it(grid, tmp_path, monkeypatch):
    tried = []

    def short_of_memory(self, payloads, people):
        tried.append(payloads[0].client)
        raise MemoryError

    monkeypatch.setattr(Embedded, "train", short_of_memory)
    flower = engine(grid)
    flower.settings = {**SETTINGS, "lower_rank": False}
    _, (record,) = play(flower, tmp_path, rounds=1, rules=Rules(Limits(lower_rank=False)))
    assert {r.reason for r in record.refused} == {Reason.MEMORY}
    assert sorted(tried) == list(RANKS)


def test_no_error_text_leaves_a_node(grid, tmp_path, monkeypatch):
    def explode(*args, **kwargs):
        raise ValueError(f"cannot tokenize {SECRET!r}")

    monkeypatch.setattr(node, "fitted", explode)
    _, (record,) = play(engine(grid), tmp_path, rounds=1)
    assert {r.client: r.reason for r in record.refused} == dict.fromkeys(RANKS, Reason.FAILED)
    assert SECRET not in str(record.to_json())
    assert len(grid.replies) == 3
    for reply in grid.replies:
        assert reply.has_content()
        assert "Wilhelmina" not in str(dict(reply.content.config_records["about"]))
    assert SECRET in (tmp_path / "ann" / "errors.log").read_text()
    assert (tmp_path / "ann" / "errors.log").stat().st_mode & 0o077 == 0


def test_memory_that_does_not_suffice_means_half_the_rank_declared(grid, tmp_path, monkeypatch):
    real = Embedded.train

    def short_of_memory(self, payloads, people):
        if max(d.rank for d in payloads[0].adapter.values()) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 5 GB")
        return real(self, payloads, people)

    monkeypatch.setattr(Embedded, "train", short_of_memory)
    rules = Rules(Limits(lower_rank=True))
    _, (record,) = play(engine(grid), tmp_path, rounds=1, rules=rules)
    assert {c: row["ranks"] for c, row in record.clients.items()} == {c: [4] for c in RANKS}


def test_out_of_memory_at_every_rank_is_named(grid, tmp_path, monkeypatch):
    def none(self, payloads, people):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Embedded, "train", none)
    _, (record,) = play(engine(grid), tmp_path, rounds=1)
    assert {r.reason for r in record.refused} == {Reason.MEMORY}


def test_deaths_are_reported_by_name_and_a_node_comes_back(grid, tmp_path):
    flower = engine(grid, deadline=3.0)
    grid.gone, grid.crash = {100}, {101: Error(5, f"{SECRET}")}
    state, method = first_state(), make("flexlora")
    spool = Spool(1 << 30, tmp_path)
    state, record = run_round(method, state, clients(), flower, spool)
    assert {r.client: r.reason for r in record.refused} == {
        "ann": Reason.OFFLINE,
        "bob": Reason.OFFLINE,
    }
    assert SECRET not in str(record.to_json())
    grid.gone, grid.crash = set(), {}
    state, record = run_round(method, state, clients(), flower, spool)
    assert set(record.clients) == set(RANKS)


def test_a_new_rank_next_round(grid, tmp_path):
    flower, spool, method = engine(grid), Spool(1 << 30, tmp_path), make("flexlora")
    state, _ = run_round(method, first_state(), clients(), flower, spool)
    state, record = run_round(method, state, clients({**RANKS, "ann": 16}), flower, spool)
    assert record.clients["ann"]["ranks"] == [16]


def test_late_answers_are_counted_and_never_mixed_into_another_round(grid, tmp_path):
    flower, spool, method = engine(grid, deadline=1.0), Spool(1 << 30, tmp_path), make("flexlora")
    grid.silent = {101}
    state, record = run_round(method, first_state(), clients(), flower, spool)
    assert [(r.client, r.reason) for r in record.refused] == [("bob", Reason.LATE)]
    grid.silent = set()
    flower.deadline = 60
    while not flower.late_answers:
        state, record = run_round(method, state, clients(), flower, spool)
        assert set(record.clients) == set(RANKS)
    assert flower.late_answers == {"bob": 1}

    alone = [c for c in clients() if c.id != "bob"]
    reference, _ = run_round(method, first_state(), alone, embedded(), spool)
    while reference.round < state.round:
        reference, _ = run_round(method, reference, clients(), embedded(), spool)
    assert same(state, reference)


def test_a_round_closes_when_enough_have_answered(grid, tmp_path):
    grid.silent = {102}
    durable = Durable(engine(grid), tmp_path / "inbox", enough=2)
    _, (record,) = play(durable, tmp_path, rounds=1)
    assert set(record.clients) == {"ann", "bob"}
    assert [(r.client, r.reason) for r in record.refused] == [("cho", Reason.LATE)]


def test_the_same_payload_gets_the_same_bytes_without_training(grid, tmp_path, monkeypatch):
    """A server that died before it stored an answer asks again."""
    first, _ = play(engine(grid), tmp_path, rounds=1)

    def never(*args):
        raise AssertionError("trained twice")

    monkeypatch.setattr(node, "fitted", never)
    again, _ = play(engine(grid), tmp_path, rounds=1)
    assert same(first, again)


def test_an_acknowledged_answer_is_forgotten(grid, tmp_path):
    play(engine(grid), tmp_path, rounds=2)
    assert len(list((tmp_path / "ann" / "answers").iterdir())) == 1


def test_hello_says_counts_and_columns_never_content(tmp_path):
    site = node.Site("bob", base(), POPULATION, tmp_path, memory=16 * 8 * 1000)
    about = node.hello(site, Parcel({"targets": list(TARGETS)})).about
    sides = sum(sum(shape) for shape in shapes().values())
    assert about["rank"] == 8 * 1000 // sides
    assert about["examples"] == {"train": 16, "test": 4}
    assert about["columns"] == ["instruction", "output"]
    assert about["base"] == base().fingerprint
    assert SECRET not in str(about)


def test_evaluation_at_the_nodes_is_the_embedded_engines(grid):
    state = first_state()
    method = make("flexlora")
    payloads = [replace(method.downlink(state, c), train="") for c in clients()]
    wanted = {
        "split": "test",
        "metrics": ["loss"],
        "max_examples": None,
        "max_generated": None,
        "max_new_tokens": 8,
    }
    found = engine(grid).evaluate(payloads, wanted)
    for p in payloads:
        want = embedded().evaluate({p.client: p.adapter})[p.client]
        assert found[p.client] == (dict(want.values), want.examples)


@pytest.mark.parametrize("count", [1000])
def test_a_thousand_tiny_clients(tmp_path, count):
    """Mixed ranks, random order, 30 % silent, 10 % failing: who answers is who is admitted."""
    everyone = people([(2, 4, 8)[i % 3] for i in range(count)])
    by_id = {c.id: c for c in everyone}
    silent = {100 + i for i in range(count) if i % 10 in (1, 4, 7)}
    failing = {c.id for i, c in enumerate(everyone) if i % 10 == 5}  # LATE if still to come

    def answer(config, kind, asked):
        client = by_id[config["client"]]
        if client.id in failing:
            raise RuntimeError(SECRET)
        payload = decode_payload(asked.data)
        adapter = {m: replace(d, B=d.B + 0.01 * d.rank) for m, d in payload.adapter.items()}
        update = replace(Quadratic(steps={client.id: 0}).one(payload, client), adapter=adapter)
        return Parcel({}, encode_update(update, payload, digest(asked.data), "float32"))

    grid = InProcess(make_client_app(answer), [{"client": c.id} for c in everyone], seed=3)
    grid.silent = silent
    nodes = {c.id: 100 + i for i, c in enumerate(everyone)}
    flower = Flower(grid, nodes, run="run", deadline=30.0, poll=0.0)
    answering = count - len(silent) - len(failing)
    durable = Durable(flower, tmp_path / "inbox", enough=answering)
    spool, state = Spool(1 << 30, tmp_path / "spool"), start(everyone)
    rules = Rules(cosines=False)
    _, record = run_round(make("flexlora"), state, everyone, durable, spool, rules)
    mute = {c for c, n in nodes.items() if n in silent}
    assert set(record.clients) == by_id.keys() - failing - mute
    assert {r.client for r in record.refused} == failing | mute
    assert {r.reason for r in record.refused} <= {Reason.FAILED, Reason.LATE}
    assert SECRET not in str(record.to_json())


@pytest.mark.parametrize("text", ["[" * 50_000, "9" * 5_000, "[]", "{", " " * (1 << 20) + "{}"])
def test_a_reply_that_is_no_reply_is_malformed(text):
    content = RecordDict({"about": ConfigRecord({"json": text})})
    with pytest.raises(ValueError, match="not made by flexlora"):
        unpack(content)


def test_a_greeting_is_checked_in_the_servers_words():
    ours = {"wire": 1, "base": "b", "tokenizer": "t", "template": "c"}
    good = {**ours, "client": "a", "examples": {"train": 3}, "columns": ["instruction", "output"]}
    assert checked(7, good, ours).examples == 3
    for wrong in (
        {"base": SECRET},
        {"client": SECRET},
        {"client": 3},
        {"examples": {"train": True}},
        {"examples": {"train": 10**15}},
        {"examples": 5},
        {"columns": ["output"]},
        {"columns": None},
        {"rank": 0},
        {"rank": 2.5},
    ):
        with pytest.raises(ValueError, match=r"^(it|the rank)") as caught:
            checked(7, {**good, **wrong}, ours)
        assert SECRET not in str(caught.value)
