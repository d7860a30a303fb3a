"""A server loop that is killed again and again: python killed_server.py FOLDER KILLS SEED.

Each kill is a SIGKILL at a random moment of a forked server. The nodes are files: an answer is made
once, at random, and then replayed, as a real node's cache does; a node may be silent at random, so
that who is admitted is only known to the ledger. The last line of stdout is a JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from federation.quadratic import people, start

from flexlora.engines.flower.answers import decode_update, encode_update
from flexlora.engines.flower.durable import Durable
from flexlora.engines.flower.replay import store
from flexlora.experiment import durable
from flexlora.federation import ledger
from flexlora.federation.admission import Reason, Refusal
from flexlora.federation.limits import NORMS
from flexlora.federation.round import run_round
from flexlora.federation.sampling import cohort
from flexlora.federation.spool import Spool
from flexlora.federation.state import Client, Payload, ServerState, Update
from flexlora.methods import make

ROUNDS = 4
CLIENTS = people([2, 4, 8, 4, 2, 8])


class Nodes:
    """Nodes as files; `only` restricts them to those, for the recomputation."""

    def __init__(self, folder: Path, silence: float, only: Sequence[str] | None = None):
        self.folder, self.silence, self.only = folder, silence, only

    def train(
        self, payloads: Sequence[Payload], clients: Mapping[str, Client]
    ) -> Iterator[Update | Refusal]:
        shuffled = [p for p in payloads if self.only is None or p.client in self.only]
        random.SystemRandom().shuffle(shuffled)
        for payload in shuffled:
            if random.SystemRandom().random() < self.silence:
                yield Refusal(payload.client, Reason.LATE, "silent")
                continue
            path = self.folder / f"{payload.round}-{payload.client}.safetensors"
            if not path.is_file():
                store(path, self.trained(payload, clients[payload.client].num_examples))
            yield decode_update(path.read_bytes(), payload, "", "float32")

    def trained(self, payload: Payload, examples: int) -> bytes:
        adapter = {
            m: replace(d, B=d.B + 0.1 * torch.randn_like(d.B), A=d.A + 0.1 * torch.randn_like(d.A))
            for m, d in payload.adapter.items()
        }
        update = Update(payload.client, payload.round, payload.base, adapter, examples)
        return encode_update(update, payload, "", "float32")


def invite(state: ServerState) -> list[Client]:
    by_id = {c.id: c for c in CLIENTS}
    return [by_id[c] for c in cohort(state.seed, state.round + 1, sorted(by_id), 5)]


def serve(folder: Path) -> None:
    """The server: all rounds that are left."""
    torch.manual_seed(random.SystemRandom().randrange(1 << 60))
    engine = Durable(Nodes(folder / "nodes", 0.2), folder / "inbox")
    for _ in durable.rounds(folder, make("flexlora"), start(CLIENTS), invite, engine, ROUNDS):
        pass


def forked(folder: Path, seconds: float | None) -> bool:
    """Serve in a child; kill it after so many seconds. Whether it had finished."""
    child = os.fork()
    if child == 0:
        try:
            serve(folder)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"the server failed in {folder}")
    return os.WIFEXITED(status)


def agrees(folder: Path) -> bool:
    """The final state against plain rounds over the ledger's sets; the chain and counts too."""
    state = start(CLIENTS)
    admitted = ledger.admitted(folder / "ledger.jsonl")
    assert sorted(admitted) == list(range(1, ROUNDS + 1)), admitted
    for round, clients in admitted.items():
        assert len(set(clients)) == len(clients)
        nodes = Nodes(folder / "nodes", 0.0, clients)
        spool = Spool(1 << 30, folder / "again")
        state, record = run_round(make("flexlora"), state, invite(state), nodes, spool)
        assert state.round == round
        assert set(record.clients) == set(clients)
    saved, _ = durable.last_saved(folder, start(CLIENTS))
    assert torch.equal(saved.aux[NORMS], state.aux[NORMS])
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [x["round"] for x in lines] == list(range(1, ROUNDS + 1))
    return durable.fingerprint(saved) == durable.fingerprint(state)


def main(folder: Path, kills: int, seed: int) -> None:
    rng, done, trials, whole = random.Random(seed), 0, 0, 1.0
    forked(folder / "warm-up", None)
    began = time.monotonic()
    forked(folder / "measured", None)
    whole = time.monotonic() - began
    while done < kills:
        place = folder / f"trial-{trials}"
        place.mkdir()
        finished = False
        for _ in range(rng.randint(1, 4)):
            if not finished and done < kills:
                finished = forked(place, rng.uniform(0, whole))
                done += not finished
        if not finished:
            forked(place, None)
        assert agrees(place), place
        trials += 1
    print(json.dumps({"kills": done, "trials": trials, "seconds_of_a_run": round(whole, 3)}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ("warm-up", "measured"):
        (Path(sys.argv[1]) / name).mkdir(parents=True)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
