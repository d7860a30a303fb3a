"""The process that keeps a node's model: private, quick the second time, gone with its node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("flwr", reason="needs flwr: pip install 'flexlora[flower]'")

from flexlora.engines.flower.messages import Parcel
from flexlora.experiment import worker

pytestmark = pytest.mark.deployment


@pytest.fixture
def settings(tmp_path, tiny_model_dir) -> dict[str, str]:
    rows = [{"c": "me", "instruction": f"Say {i}", "input": "", "output": "x"} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"name_or_path": str(tiny_model_dir), "dtype": "float32"},
        "data": {
            "kind": "jsonl",
            "path": str(tmp_path / "data.jsonl"),
            "columns": {"client": "c"},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return {
        "config": str(tmp_path / "config.yaml"),
        "client": "me",
        "folder": str(tmp_path / "node"),
    }


def test_a_worker_lives_as_long_as_its_node(settings, monkeypatch, capsys):
    node = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    monkeypatch.setattr(worker, "_node", lambda: node.pid)
    asked = Parcel({"targets": ["q_proj"]})
    try:
        times = []
        for _ in range(2):
            began = time.perf_counter()
            about = worker.ask(settings, "query.hello", asked).about
            times.append(time.perf_counter() - began)
        assert about["client"] == "me", about
        assert times[1] < 0.1 * times[0]
        with capsys.disabled():
            print(f"\nfirst message {times[0]:.2f} s, second {times[1]:.3f} s")
        place = Path(worker.socket_of(Path(settings["folder"])))
        assert place.parent.stat().st_mode & 0o077 == 0
        failed = worker.ask({**settings, "client": "nobody"}, "query.hello", asked)
        assert failed.about == {"reason": "failed"}
    finally:
        node.kill()
        node.wait()
    end = time.monotonic() + 20
    while place.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not place.exists()


def test_a_socket_folder_that_others_may_enter_is_refused(tmp_path):
    place = Path(worker.socket_of(tmp_path)).parent
    os.chmod(place, 0o755)
    with pytest.raises(PermissionError, match="alone"):
        worker.socket_of(tmp_path)
    place.rmdir()
