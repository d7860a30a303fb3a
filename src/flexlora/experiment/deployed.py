"""A run over Flower: the server's main loop. Its run directory is that of any other run.

The clients are whoever holds a registered node key and greets with the same model and tokenizer.
Rounds are played by :func:`~flexlora.experiment.durable.rounds`, so a server that was killed goes
on where it was when it is started again with the same `output_dir`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.serverapp import Grid

from flexlora.data.task import Task
from flexlora.engines.flower.durable import Durable
from flexlora.experiment import durable, runs
from flexlora.experiment.build import cohort_size
from flexlora.experiment.checkpoints import Progress
from flexlora.experiment.console import Console
from flexlora.experiment.deployment import (
    Server,
    Terms,
    clients_now,
    first_state,
    open_server,
    settled,
)
from flexlora.experiment.errors import Failure
from flexlora.experiment.evaluation import table
from flexlora.experiment.export import save_adapter
from flexlora.experiment.plots import plot_loss
from flexlora.experiment.summary import evaluation_line, round_line, summarise
from flexlora.experiment.trackers import Log, trackers
from flexlora.federation.admission import Reason
from flexlora.federation.limits import Limits
from flexlora.federation.round import RoundRecord, Rules
from flexlora.federation.sampling import cohort
from flexlora.federation.state import Client, Payload, ServerState
from flexlora.training.evaluate import Scores


def serve(grid: Grid, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Play a run to its end, from wherever its directory stands; returns its summary.

    Raises:
        Failure: a configuration, a model or a directory that cannot be used.
    """
    began = time.monotonic()
    names = {name.replace("-", "_"): value for name, value in settings.items()}
    terms = Terms(**{k: v for k, v in names.items() if k in Terms.__annotations__})
    server = open_server(grid, terms, Console(sys.stdout))
    if (server.folder / "summary.json").is_file():
        server.console.say(f"{server.folder} is finished")
        return runs.read(server.folder / "summary.json")
    _wait(server)
    server = settled(server)
    first = first_state(server)
    state, _ = durable.last_saved(server.folder, first)
    clients_now(server, state.round + 1)  # an interrupted round has its people, not their nodes
    config = server.config
    if state.round == 0 and config.evaluation.every:
        runs.cut_metrics(server.folder, 0)
        measure(server, first, base_model=True)
        durable.save(server.folder, first, Progress())
    with trackers(config.report_to, server.folder, config.model_dump(mode="json")) as log:
        for state, record in rounds(server, first):
            log(record.to_json(), state.round)
            seconds = time.monotonic() - began
            server.console.say(round_line(record, config.federation.rounds, seconds))
            for refusal in record.refused:
                server.console.say(f"  {refusal.client}: {refusal.reason.value}")
        after = measure(server, state, log=log) if config.evaluation.every else {}
    return finish(server, state, after, time.monotonic() - began)


def rounds(server: Server, first: ServerState) -> Iterator[tuple[ServerState, RoundRecord]]:
    """The rounds that are left."""
    federation, folder = server.config.federation, server.folder
    engine = Durable(
        server.board.watching(server.flower), folder / "inbox", federation.wire, server.flower.run
    )

    def invite(state: ServerState) -> Sequence[Client]:
        clients = {c.id: c for c in clients_now(server, state.round + 1)}
        asked, there = federation.clients_per_round, len(clients)
        # A number may be more than are connected now: then it is all of them.
        size = min(asked, there) if isinstance(asked, int) else cohort_size(server.config, there)
        more = min(len(clients), round(size * (1 + server.terms.over_selection)))
        engine.enough = size
        chosen = cohort(federation.seed, state.round + 1, sorted(clients), more)
        return [clients[c] for c in chosen]

    rules = Rules(Limits(lower_rank=server.method.mixed_ranks))
    played = durable.rounds(folder, server.method, first, invite, engine, federation.rounds, rules)
    for state, record in played:
        away = {Reason.OFFLINE, Reason.BASE, Reason.UNKNOWN_CLIENT}
        for refusal in record.refused:
            if refusal.reason in away:
                server.roster.dismiss(refusal.client)
        yield state, record


def measure(
    server: Server, state: ServerState, base_model: bool = False, log: Log | None = None
) -> dict[str, Any]:
    """Every connected client measures the model on its own test split.

    That is the global model; its own one where clients keep factors, which nobody else has.
    """
    method, wanted = server.method, server.config.evaluation
    clients, own = clients_now(server, max(1, state.round)), not (base_model or method.stateless)
    if own:
        payloads = [replace(method.downlink(state, c), train="") for c in clients]
    else:
        view = {} if base_model else method.view(state, None)
        patch = {} if base_model else {m: (t,) for m, t in state.patch.items()}
        payloads = [Payload(c.id, state.round, state.base, view, patch, train="") for c in clients]
    about = {
        "split": "test",
        "metrics": list(wanted.metrics),
        "max_examples": wanted.max_examples,
        "max_generated": wanted.max_generated,
        "max_new_tokens": wanted.max_new_tokens,
    }
    found = {c: Scores(v, n) for c, (v, n) in server.flower.evaluate(payloads, about).items()}
    people = {c: Task(c, c, "", {}, lambda split: []) for c in found}
    line: dict[str, Any] = {
        "round": state.round,
        "split": "test",
        "view": "own" if own else "global",
    }
    line |= {"seen": table(people, found), "unseen": table({}, {})}
    runs.append_metrics(server.folder, "evaluation", line)
    if log:
        log({line["split"]: {line["view"]: line}}, line["round"])
    server.console.say(evaluation_line(line))
    return line


def finish(
    server: Server, state: ServerState, after: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """The adapter and the summary; `after` is the last evaluation, if there is one."""
    folder = server.folder
    save_adapter(folder / "adapters" / "global", server.method, state, server.base.name)
    lines = [m for m in runs.read_metrics(folder) if m["kind"] == "evaluation"]
    empty = {g: table({}, {}) for g in ("seen", "unseen")}
    _, progress = durable.last_saved(folder, state)
    summary = summarise(
        folder,
        lines[0] if lines else empty,
        after or empty,
        seconds=round(seconds, 1),
        rounds=state.round,
        method=server.config.method.name,
        ranks=progress.ranks,
        late=server.flower.late_answers,
    )
    plot_loss(folder)
    runs.write(folder / "summary.json", json.dumps(summary, indent=2))
    server.board.finished()
    server.console.say(f"{folder}: metrics.jsonl, ledger.jsonl, adapters/global (PEFT)")
    return summary


def _wait(server: Server) -> None:
    """Until enough nodes are there.

    Raises:
        Failure: they do not come.
    """
    end = time.monotonic() + server.terms.start_within
    while len(members := server.roster.connected()) < max(1, server.terms.min_nodes):
        if time.monotonic() > end:
            raise Failure(
                f"{len(members)} nodes after {server.terms.start_within:g} s; expected "
                f"{server.terms.min_nodes} (min-nodes). Turned away: {server.roster.turned_away}."
            )
        time.sleep(1.0)
