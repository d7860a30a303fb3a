"""Fixtures of the tests with real processes."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from engines.flower.lab import PORTS, Lab, blocks, command, without_nginx


@pytest.fixture
def lab(tmp_path, tiny_model_dir) -> Iterator[Lab]:
    for port in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port} is in use")
    made = Lab(tmp_path, tiny_model_dir)
    yield made
    made.stop()


@pytest.fixture
def three(lab) -> Lab:
    """Server and three sites at ranks 4, 8 and 16; float32, no evaluation."""
    first, server, operator, sites, *_ = blocks()
    lab.run(first)
    lab.use(lab.model)
    path = lab.lab / "config.yaml"
    text = path.read_text().replace("wire: bfloat16", "wire: float32")
    path.write_text(text.replace("every: 1", "every: 0"))
    lab.run("ssh-keygen -q -t ecdsa -b 384 -N '' -f keys/west; mkdir home-west")
    lab.run(without_nginx(server))
    lab.run(operator, "flwr supernode register keys/west.pub lab --name west")
    south = sites[sites.index("FLWR_HOME=$PWD/home-south") :]
    west = south.replace("south", "west").replace("19092", "19093")
    west = west.replace("letter_counting", "spell_backward").replace('memory=\\"1G\\"', "rank=16")
    sites = sites.replace('memory=\\"1G\\"', "rank=8")
    lab.started = [command(f"{sites}{west}", f"keys/{site}") for site in ("north", "south", "west")]
    lab.run(*lab.started)
    return lab
