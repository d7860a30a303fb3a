"""SIGKILL of real Flower processes in a round: server app, SuperLink, node; a key used twice."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import psutil
import pytest
from engines.flower.lab import RANKS, Lab, blocks, command, final, submit, until

from flexlora.experiment import runs
from flexlora.federation import ledger

pytest.importorskip("flwr", reason="needs flwr: pip install 'flexlora[flower]'")
pytestmark = pytest.mark.deployment

IN_BACKGROUND = " > logs/run.log 2>&1 &\necho $! >> pids"


def rounds(folder: Path) -> list[dict]:
    """What was recorded of the rounds so far."""
    return [m for m in runs.read_metrics(folder) if m["kind"] == "round"]


def away_from_embedded(lab: Lab, folder: Path) -> float:
    """Largest difference to the same run on one machine with everybody in every round."""
    ranks = json.dumps(RANKS).replace('"', "")
    lab.run(
        "flexlora run config.yaml --output_dir embedded --training.group_size 1 "
        f"--lora.r '{ranks}' --data.families '{list(RANKS)}'"
    )
    state, reference = final(folder), final(lab.lab / "embedded")
    assert state.round == reference.round == 2
    return max(float((g.dense() - reference.G[m].dense()).abs().max()) for m, g in state.G.items())


def test_three_sites_are_the_embedded_engine_even_if_the_server_app_is_killed(three):
    """In round 1, with an answer stored; then the same command again."""
    lab, folder = three, three.lab / "run"
    lab.run(submit("run") + IN_BACKGROUND)
    until(lambda: list(folder.glob("inbox/round-*/*.safetensors")))
    superexec = psutil.Process(lab.pid("flower-superexec"))
    apps = [p for p in superexec.children(recursive=True) if "flwr-serverapp" in p.name()]
    assert apps
    for app in apps:
        app.kill()
    lab.run(submit("run"))
    assert (folder / "summary.json").is_file(), lab.logs()
    assert ledger.admitted(folder / "ledger.jsonl") == dict.fromkeys((1, 2), tuple(RANKS))
    assert away_from_embedded(lab, folder) <= 1e-6


def test_a_superlink_that_is_killed_and_restarted_loses_nothing(three):
    """When the first node has trained and is about to answer: its answer finds no SuperLink."""
    lab, folder = three, three.lab / "run"
    _, server, *_ = blocks()
    lab.run(submit("run") + IN_BACKGROUND)
    until(lambda: list(lab.lab.glob("*/answers/*.safetensors")))
    lab.kill("flower-superlink")
    time.sleep(5)
    lab.run(command(server, "flower-superlink "))
    until(lambda: (folder / "summary.json").is_file(), 240)
    assert ledger.admitted(folder / "ledger.jsonl") == dict.fromkeys((1, 2), tuple(RANKS))
    assert away_from_embedded(lab, folder) <= 1e-6


def test_a_fresh_superlink_goes_on_with_the_run(three):
    """Server app, SuperLink and its database are lost in round 1; run directory and sites are not.

    What docs/deploy.md says then: start both anew, register the keys, restart the sites' nodes,
    give the same command.
    """
    lab, folder = three, three.lab / "run"
    _, server, operator, *_ = blocks()
    lab.run(submit("run") + IN_BACKGROUND)
    until(lambda: list(folder.glob("inbox/round-*/*.safetensors")))
    lab.kill("flower-superexec")
    lab.kill("flower-superlink")
    stored = list(folder.glob("inbox/round-*/*.safetensors"))
    lab.run(
        "rm link.db*",
        command(server, "flower-superlink "),
        command(server, "flower-superexec "),
        operator,
        "flwr supernode register keys/west.pub lab --name west",
    )
    for site in ("north", "south", "west"):
        lab.restart(f"keys/{site}")
    lab.run(submit("run"))
    assert stored
    assert ledger.admitted(folder / "ledger.jsonl") == dict.fromkeys((1, 2), tuple(RANKS)), (
        lab.logs()
    )
    assert away_from_embedded(lab, folder) <= 1e-6


def test_a_killed_node_is_named_and_takes_part_again(three):
    """West is killed in round 1, and is back some rounds later."""
    lab, folder = three, three.lab / "run"
    config = lab.lab / "config.yaml"
    config.write_text(config.read_text().replace("rounds: 2", "rounds: 6"))
    lab.run(submit("run") + IN_BACKGROUND)
    until(lambda: (folder / "cohorts").is_dir())
    lab.kill("keys/west")
    until(lambda: rounds(folder), 120)
    first = rounds(folder)[0]
    assert {r["client"]: r["reason"] for r in first["refused"]} == {"spell_backward": "offline"}
    assert set(first["clients"]) == {"chain_sum", "letter_counting"}
    lab.restart("keys/west")  # Flower has found out that it was gone, so it is let in
    until(lambda: (folder / "summary.json").is_file(), 240)
    took_part = [r["round"] for r in rounds(folder) if "spell_backward" in r["clients"]]
    assert took_part, lab.logs()
    assert took_part == list(range(took_part[0], 7))


def test_a_second_node_with_the_same_key_is_refused(three):
    """It ends with an error while the first one is connected, and the first one goes on."""
    lab = three
    _, _, _, sites, *_ = blocks()
    until(lambda: "online" in lab.run("flwr supernode list lab --format json"))
    twin = command(sites, "keys/north").replace("home-north", "home-twin").replace("19091", "19094")
    twin = twin.removesuffix("echo $! >> pids").strip().removesuffix("&")
    twin = "timeout 60 env " + twin.replace("logs/north.log", "logs/twin.log")
    ended = re.search(
        r"ended with (\d+)", lab.run(f"mkdir home-twin\n{twin} || echo ended with $?")
    )
    assert ended, lab.logs()
    assert int(ended[1]) != 124  # it was still trying
    assert "2004" in (lab.lab / "logs" / "twin.log").read_text()
    lab.run(submit("run"))
    assert ledger.admitted(lab.lab / "run" / "ledger.jsonl") == dict.fromkeys((1, 2), tuple(RANKS))
