"""Several devices, played by copies of the tiny model on the CPU."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bank_cases import TARGETS, base_of
from experiment.small import write_config

from flexlora import cli
from flexlora.adapter import LoraSpec, initial_adapter, select
from flexlora.data.task import Example, Task
from flexlora.engines import embedded
from flexlora.engines.embedded import Embedded, Prompting
from flexlora.experiment import run as loop
from flexlora.federation.state import Client, Payload, Update
from flexlora.training import client as local
from flexlora.training import step
from flexlora.training.ahead import ahead, at_once
from flexlora.training.client import LocalTraining, Progress
from flexlora.training.devices import deal, replica, resolve_devices
from flexlora.training.models import Base, ModelError, resolve_device

CLIENTS = [Client(f"c{n}", LoraSpec(2 + n, lora_alpha=8), 3 + 2 * n) for n in range(5)]


def engine(dtype: torch.dtype = torch.float64, devices: int = 2, **training: Any) -> Embedded:
    tasks = {}
    for n, c in enumerate(CLIENTS):
        rows = [Example(f"say {n} {i}", "", "yes" * (1 + i % 3)) for i in range(c.num_examples)]
        tasks[c.id] = Task(c.id, "t", "", {"train": len(rows)}, lambda split, rows=rows: rows)
    base = base_of(dtype)
    settings = LocalTraining(learning_rate=1e-2, per_device_train_batch_size=2, **training)
    copies = tuple(replica(base, "cpu") for _ in range(devices - 1))
    return Embedded(base, tasks, settings, prompting=Prompting(max_length=64), replicas=copies)


def payloads(base: Base) -> list[Payload]:
    shapes = {m: base.shapes[m] for m in select(base.shapes, TARGETS)}
    found = []
    for n, c in enumerate(CLIENTS):
        start = initial_adapter(shapes, {m: c.lora.rank(m) for m in shapes}, n)
        found.append(Payload(c.id, 1, base.fingerprint, start, {}, train="AB"))
    return found


def trained(some: Embedded) -> Iterator[Update]:
    for update in some.train(payloads(some.base), {c.id: c for c in CLIENTS}):
        assert isinstance(update, Update)
        yield update


def apart(some: Embedded, other: Embedded) -> float:
    """The largest relative difference between what two engines train."""
    a, b = ({u.client: u.adapter for u in trained(e)} for e in (some, other))
    assert a.keys() == b.keys() == {c.id for c in CLIENTS}
    return max(
        float((getattr(a[c][m], f) - x).norm() / x.norm())
        for c in a
        for m, d in b[c].items()
        for f, x in (("A", d.A), ("B", d.B))
    )


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_at_a_time_the_bits_are_those_of_one_device(dtype: torch.dtype) -> None:
    settings = {"group_size": 1, "lora_dropout": 0.1}
    assert apart(engine(dtype, 3, **settings), engine(dtype, 1, **settings)) == 0


@pytest.mark.parametrize("group", [2, "auto"])
def test_groups_are_those_of_one_device_to_rounding(group: int | str) -> None:
    assert apart(engine(group_size=group), engine(devices=1, group_size=group)) < 1e-10


def test_the_same_dealing_gives_the_same_bits() -> None:
    assert apart(engine(torch.float32, group_size=2), engine(torch.float32, group_size=2)) == 0


def test_each_device_has_its_own_clients_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both wait for each other in every client's last step: one thread alone would never end."""
    some, where = engine(group_size=1, max_steps=1), dict[str, int]()
    both, real = threading.Barrier(2, timeout=30), local._finish
    monkeypatch.setattr(local, "_finish", lambda *a: (both.wait(), real(*a))[1])
    bases = [id(b.model) for b in (some.base, *some.replicas)]
    start = local._start

    def noted(bank: Any, slot: int, job: Any, *rest: Any) -> Any:
        where[job.client.id] = bases.index(id(bank.model))
        return start(bank, slot, job, *rest)

    monkeypatch.setattr(local, "_start", noted)
    work = payloads(some.base)[:4]
    assert len(list(some.train(work, {c.id: c for c in CLIENTS}))) == 4
    dealt = deal({p.client: 2 for p in work}, 2)
    assert where == {c: k for k, group in enumerate(dealt) for c in group}


def test_dealing_is_a_function_of_the_cohort() -> None:
    work = {c.id: c.num_examples for c in CLIENTS}
    dealt = [["c4", "c1", "c0"], ["c3", "c2"]]  # of 11, 9, 7, 5 and 3 examples
    assert deal(work, 2) == deal(dict(reversed(work.items())), 2) == dealt
    assert deal({"b": 3, "a": 3}, 2) == [["a"], ["b"]]
    assert deal({"a": 1}, 3) == [["a"], [], []]


def test_more_devices_than_clients() -> None:
    some = engine(devices=2)
    (only,) = some.train(payloads(some.base)[:1], {c.id: c for c in CLIENTS})
    assert isinstance(only, Update)


def test_a_copy_has_weights_of_its_own_and_keeps_ties() -> None:
    base = base_of()
    other = replica(base, "cpu")
    mine, theirs = (list(b.model.parameters()) for b in (base, other))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not {p.data_ptr() for p in mine} & {p.data_ptr() for p in theirs}
    assert not any(p.requires_grad for p in theirs)
    assert other.model.lm_head.weight is other.model.model.embed_tokens.weight
    there = replica(base, "meta").model
    assert {x.device.type for x in (*there.parameters(), *there.buffers())} == {"meta"}
    assert (other.fingerprint, other.flat) == (base.fingerprint, base.flat)


def failing(model: torch.nn.Module, error: Exception, times: int = 1) -> Any:
    """`step._passes` that fails on one model."""
    real, calls = step._passes, []

    def passes(base: Base, *rest: Any) -> torch.Tensor:
        if base.model is model and len(calls) < times:
            calls.append(1)
            raise error
        return real(base, *rest)

    return passes


def test_an_error_stops_all_with_its_own_message(monkeypatch: pytest.MonkeyPatch) -> None:
    some, before, steps = engine(max_steps=100_000), threads(), []
    some = replace(some, on_step=steps.append)
    broken = failing(some.replicas[0].model, ValueError("client c3: its loss is not a number"))
    monkeypatch.setattr(step, "_passes", broken)
    with pytest.raises(ValueError, match=r"^client c3: its loss is not a number$"):
        list(trained(some))
    assert threads() == before
    assert len(steps) < 100  # the other would have gone on for hours


def test_leaving_a_round_early_leaves_no_thread() -> None:
    before, some = threads(), engine(group_size=1, max_steps=3)
    answers = trained(some)
    next(answers)
    assert threads() > before
    answers.close()
    assert threads() == before


def test_a_reader_of_data_ends_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where texts are read ahead in one more thread."""
    some, before = engine(devices=1), threads()
    monkeypatch.setattr(local, "ahead", lambda loads, depth: ahead(loads, 2))
    monkeypatch.setattr(step, "_passes", failing(some.base.model, ValueError("broken")))
    with pytest.raises(ValueError, match="broken") as held:
        list(trained(some))
    assert threads() == before
    assert held.tb is not None  # which keeps the frames of the error


def test_threads_do_not_wait_for_a_slow_reader_for_ever() -> None:
    before = threads()
    many = at_once([lambda check: iter(range(1000)), lambda check: iter(range(1000))])
    assert next(many) == 0
    many.close()
    assert threads() == before


def test_out_of_memory_halves_one_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    some = engine(tokens_per_forward=512)
    known = engine(devices=1)
    error = torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(step, "_passes", failing(some.replicas[0].model, error))
    with pytest.warns(RuntimeWarning, match="out of memory on cpu at 512 tokens") as said:
        assert apart(some, known) < 1e-10
    assert len(said) == 1
    assert [b.tokens for b in some.budgets] == [512, 256]
    sizes = json.loads(json.dumps(some.sizes(payloads(some.base))))
    assert [b.tokens for b in engine().settled(sizes).budgets] == [512, 256]
    assert "tokens_per_forward_1" not in known.sizes(payloads(known.base))


def test_progress_is_of_the_whole_round(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Progress] = []
    monkeypatch.setattr(local, "REPORT_SECONDS", 0.0)
    some = replace(engine(), on_step=steps.append)
    updates = list(trained(some))
    assert {s.clients for s in steps} == {5}
    assert max(s.clients_done for s in steps) == 5
    assert sum(s.tokens for s in steps) == sum(u.metrics["tokens"] for u in updates)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["cuda:97"], r"model.device: 'cuda:97' is not there; expected auto or, .* one of cpu"),
        (["cpu", "gpu"], "model.device: 'gpu' is not there"),
        (["auto", "cpu"], "auto, cpu; expected different devices of one kind.*auto stands alone"),
    ],
)
def test_devices_that_are_not_there_are_refused(names: Sequence[str], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        resolve_devices(names)


def test_lists_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_devices(["auto"]) == ["cuda"]
    assert resolve_devices(["cuda", "cuda:1"]) == ["cuda:0", "cuda:1"]
    assert resolve_device("cuda:1") == "cuda:1"
    for wrong in (["cuda", "cuda:0"], ["cuda:0", "cpu"], ["cuda:0", "cuda:2"]):
        with pytest.raises(ModelError, match="expected"):
            resolve_devices(wrong)


def adapter(run: Path) -> bytes:
    return (run / "adapters/global/adapter_model.safetensors").read_bytes()


def test_killed_and_resumed_on_several_is_bit_identical(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(
        tmp_path,
        tiny_model_dir,
        model={"device": ["cpu", "cpu"]},
        federation={"rounds": 3, "clients_per_round": 4},
        training={"group_size": 2, "max_steps": 2},
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cli.main(["run", str(config), "--output_dir", str(whole), "--format", "json"])
    before, seen, replicas = threads(), list[int](), list[Any]()

    def break_in_round_two(kept: Any, payload: Payload, update: Update) -> Update:
        seen.append(payload.round)
        if seen.count(2) == 2:
            raise KeyboardInterrupt
        return update

    monkeypatch.setattr(embedded, "remember", break_in_round_two)
    with pytest.raises(SystemExit):
        cli.main(["run", str(config), "--output_dir", str(killed)])
    monkeypatch.undo()
    assert threads() == before
    assert not (killed / "checkpoints/round-00002").exists()
    opened = loop.open_workshop

    def noted(*args: Any) -> Any:
        replicas.append(opened(*args))
        return replicas[-1]

    monkeypatch.setattr(loop, "open_workshop", noted)
    cli.main(["resume", str(killed), "--format", "json"])
    assert len(replicas[0].engine.replicas) == 1
    assert yaml.safe_load((killed / "config.yaml").read_text())["model"]["device"] == ["cpu", "cpu"]
    saved = json.loads((killed / "checkpoints/round-00003/state.json").read_text())
    assert [k for k in saved["progress"]["sizes"] if k.startswith("tokens_per_forward_")] == [
        "tokens_per_forward_1",
        "tokens_per_forward_2",
    ]
    assert adapter(killed) == adapter(whole)


def test_a_device_that_is_not_there_ends_a_run_at_once(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_model_dir, model={"device": ["cpu", "cuda:97"]})
    for verb in ("run", "plan"):
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, str(config)])
        assert ended.value.code == 4
        assert "model.device: 'cuda:97' is not there" in capsys.readouterr().err
    for wrong in ("load_in_4bit", "load_in_8bit"):
        with pytest.raises(SystemExit):
            cli.main(["run", str(config), f"--model.{wrong}", "true"])
        assert f"{wrong} takes one device, not 2" in capsys.readouterr().err
