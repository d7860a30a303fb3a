"""The release's own partition: 1,506 clients, 472,250 rows."""

import subprocess
import sys

import pytest

from flexlora.data.load import load_population
from flexlora.data.splits import hold_out, leakage

pytestmark = pytest.mark.real_data

OPEN = """
import sys, time, psutil
from flexlora.data.load import load_population
process = psutil.Process()
before, started = process.memory_info().rss, time.perf_counter()
clients = load_population("parquet", path=sys.argv[1], empty_answers="drop")
print(time.perf_counter() - started, (process.memory_info().rss - before) / 2**20)
for client in list(clients)[:200]:
    clients[client].load("train")
first = process.memory_info().rss
for client in clients:
    clients[client].load("train")
print((process.memory_info().rss - first) / 2**20)
"""


@pytest.fixture(scope="module")
def clients(natural_instructions):
    return load_population("parquet", path=natural_instructions, empty_answers="drop")


def test_opens_in_seconds_and_memory_is_bounded(natural_instructions):
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(natural_instructions)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, opened, grown = map(float, done.stdout.split())
    assert seconds < 5
    assert opened < 300  # MiB
    assert grown < 400  # the cache of row groups, whatever number of clients is read


def test_it_is_the_release(clients, natural_instructions):
    assert len(clients) == 1506
    assert len({task.category for task in clients.values()}) == 76
    sizes = [sum(task.sizes.values()) for task in clients.values()]
    assert sum(sizes) == 472_250 - 196
    task = clients["700"]
    assert [len(task.load(s)) for s in ("train", "eval", "test")] == list(task.sizes.values())
    assert all(e.instruction and e.input and e.output.strip() for e in task.load("train"))
    with pytest.raises(ValueError, match="196 of 472250 rows have an empty 'output'"):
        load_population("parquet", path=natural_instructions)


def test_splits_by_client_leak_and_splits_by_component_do_not(clients):
    some = {client: clients[client] for client in list(clients)[:150]}
    drawn = hold_out(some, fraction=0.2)
    assert leakage(some, drawn.seen, drawn.unseen).shared > 0.2
    whole = hold_out(some, "component", fraction=0.2)
    found = leakage(some, whole.seen, whole.unseen)
    assert found.sharing_examples == found.identical_examples == 0
