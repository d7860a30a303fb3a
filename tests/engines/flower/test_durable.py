"""Kills at any moment, the ledger, and what a changed ledger does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines.flower.killed_server import CLIENTS, ROUNDS, Nodes, invite
from federation.quadratic import start

from flexlora.engines.flower.durable import Durable
from flexlora.engines.flower.replay import KEPT, recall, remember
from flexlora.experiment import durable
from flexlora.experiment.errors import Failure
from flexlora.federation import ledger
from flexlora.methods import make

SCRIPT = Path(__file__).with_name("killed_server.py")


def killed(folder: Path, kills: int, seed: int) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder / "runs"), str(kills), str(seed)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_5_random_kills(tmp_path):
    assert killed(tmp_path, 5, seed=1)["kills"] == 5


@pytest.mark.durability
def test_200_random_kills(tmp_path):
    assert killed(tmp_path, 200, seed=2)["kills"] == 200


def played(folder: Path, rounds: int = ROUNDS):
    engine = Durable(Nodes(folder / "nodes", 0.2), folder / "inbox")
    return list(durable.rounds(folder, make("flexlora"), start(CLIENTS), invite, engine, rounds))


def test_a_finished_run_leaves_a_verified_ledger_and_no_inbox(tmp_path):
    states = played(tmp_path)
    lines = list(ledger.read(tmp_path / "ledger.jsonl"))
    closing = [row for row in lines if "closed" in row]
    assert [row["round"] for row in closing] == [1, 2, 3, 4]
    assert closing[-1]["state"] == durable.fingerprint(states[-1][0])
    came = [row for row in lines if row.get("verdict") == ledger.ADMITTED]
    assert all(row["bytes"] > 0 and len(row["digest"]) == 64 for row in came)
    assert not list((tmp_path / "inbox").iterdir())


@pytest.mark.parametrize(("old", "new"), [('"admitted"', '"norm"'), ('"round": 2', '"round": 3')])
def test_a_changed_ledger_is_noticed(tmp_path, old, new):
    played(tmp_path)
    path = tmp_path / "ledger.jsonl"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(Failure, match="does not follow"):
        played(tmp_path, ROUNDS + 1)


def test_a_torn_line_is_a_round_that_never_happened(tmp_path):
    played(tmp_path, 2)
    path = tmp_path / "ledger.jsonl"
    whole = path.read_text()
    for torn in (whole + '{"round": 3, "cli', whole + whole.splitlines()[0][:-1]):
        path.write_text(torn)
        ledger.cut(path)
        assert path.read_text() == whole


def test_a_closed_round_needs_the_updates_its_ledger_names(tmp_path):
    played(tmp_path, 1)
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(ValueError, match="are not in"):
        played(tmp_path, 2)


def test_a_state_that_does_not_follow_from_the_ledger_is_an_error(tmp_path):
    """The updates of a closed round, replaced on the server's disk after the kill."""
    engine = Durable(Nodes(tmp_path / "nodes", 0.0), tmp_path / "inbox")
    engine.forget = lambda upto: None
    next(durable.rounds(tmp_path, make("flexlora"), start(CLIENTS), invite, engine, 1))
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    stored = sorted((tmp_path / "inbox" / "round-00001").iterdir())[0]
    data = bytearray(stored.read_bytes())
    data[-3] ^= 1
    stored.write_bytes(data)
    with pytest.raises(Failure, match="the ledger names state"):
        played(tmp_path, 1)


def test_a_node_keeps_few_answers_and_forgets_the_acknowledged(tmp_path):
    for i in range(5):
        remember(tmp_path, f"{i:064d}", b"answer")
    assert len(list((tmp_path / "answers").iterdir())) == KEPT
    assert recall(tmp_path, f"{4:064d}") == b"answer"
    assert recall(tmp_path, f"{4:064d}", acknowledged=f"{3:064d}") == b"answer"
    assert len(list((tmp_path / "answers").iterdir())) == 1
