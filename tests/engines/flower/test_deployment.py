"""Real Flower processes over TLS with node keys: docs/deploy.md, as it is written."""

from __future__ import annotations

import json
import re
import shutil
import time

import pytest
from engines.flower.lab import blocks, without_nginx

from flexlora.experiment import runs
from flexlora.federation import ledger

pytest.importorskip("flwr", reason="needs flwr: pip install 'flexlora[flower]'")


def test_the_walk_through_as_written(lab):
    first, server, operator, sites, run, stop = blocks()
    lab.run(first)
    lab.use(lab.model)
    lab.run(without_nginx(server))
    lab.run(operator)
    lab.run(sites)
    said = lab.run(run)
    assert "finished, 2 of 2 rounds" in said, said + lab.logs()
    assert "rank 8" in said
    admitted = ledger.admitted(lab.lab / "run" / "ledger.jsonl")
    assert admitted == dict.fromkeys((1, 2), ("chain_sum", "letter_counting")), lab.logs()
    summary = runs.read(lab.lab / "run" / "summary.json")
    assert summary["ranks"] == {"chain_sum": [4], "letter_counting": [16]}
    lab.run(stop)


@pytest.mark.deployment
def test_who_is_not_let_in(lab):
    """No key, an unregistered key, a wrong CA, plaintext: the node ends with an error."""
    first, server, operator, *_ = blocks()
    lab.run(first)
    lab.run(without_nginx(server))
    lab.run(operator)
    lab.run(
        "ssh-keygen -q -t ecdsa -b 384 -N '' -f keys/stranger",
        "./certificates.sh wrong localhost 127.0.0.1",
    )
    node = f"flower-supernode --superlink 127.0.0.1:{lab.public} --host 127.0.0.1 --max-retries 2"
    trusted = "--root-certificates certs/ca.crt"
    attempts = {
        "stranger": f"{trusted} --auth-supernode-private-key keys/stranger",
        "no key": trusted,
        "wrong CA": "--root-certificates wrong/ca.crt --auth-supernode-private-key keys/north",
        "plaintext": "--insecure",
    }
    for i, (name, options) in enumerate(attempts.items()):
        home = f"export FLWR_HOME=$PWD/home-{i}; mkdir -p $FLWR_HOME"
        started = f"timeout 60 {node} --port {19300 + i} {options} || echo ended with $?"
        ended = re.search(r"ended with (\d+)", lab.run(home, started))
        assert ended, name
        assert int(ended[1]) != 124, name  # it was still trying
    listed = lab.run("flwr supernode list lab --format json")
    nodes = json.JSONDecoder().raw_decode(listed, listed.index("{"))[0]["nodes"]
    assert {n["status"] for n in nodes} <= {"registered", "offline", "created"}, nodes


@pytest.mark.deployment
@pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx on the PATH")
def test_the_proxy_lets_nobody_else_in(lab):
    first, server, *_ = blocks()
    lab.run(first)
    lab.run(server)
    time.sleep(5)
    fetch = "import ssl, urllib.request, urllib.error\n"
    fetch += "c = ssl.create_default_context(cafile='certs/ca.crt')\n"
    fetch += "for p in ('/', '/docs', '/v1/control/list-runs', '/v1/runtime/acquire-task'):\n"
    fetch += " try: print(urllib.request.urlopen('https://127.0.0.1:19443'+p, context=c).status)\n"
    fetch += " except urllib.error.HTTPError as e: print(e.code)\n"
    (lab.lab / "fetch.py").write_text(fetch)
    assert lab.run("python fetch.py").split() == ["403"] * 4
