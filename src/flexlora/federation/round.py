"""One round: the straight path from the server to its clients and back."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from flexlora.adapter import LoraSpec
from flexlora.federation import telemetry
from flexlora.federation.admission import Reason, Refusal, Refused, admit
from flexlora.federation.limits import NORMS, Limits, norm_bound, norm_history
from flexlora.federation.spool import Spool
from flexlora.federation.state import Client, Method, Payload, ServerState, Update, ranks_of
from flexlora.lowrank import LowRank

Row = Mapping[str, Any]


class Engine(Protocol):
    """Trains clients, on this machine or elsewhere; knows no method by name."""

    def train(
        self, payloads: Sequence[Payload], clients: Mapping[str, Client]
    ) -> Iterator[Update | Refusal]:
        """Answers in any order. A client that drops out may be left out, or reported why."""


@dataclass(frozen=True)
class Rules:
    """What a round admits and what its record holds.

    Attributes:
        limits: of one update's norm and rank.
        levels: the federation's ranks, for spectra; the cohort's, if none are given.
        cosines: whether to compute them: the one costly part of telemetry at large ranks.
        per_module: whether spectra come for each module too.
    """

    limits: Limits = field(default_factory=Limits)
    levels: Mapping[str, LoraSpec] = field(default_factory=dict)
    cosines: bool = True
    per_module: bool = False


@dataclass(frozen=True)
class RoundRecord:
    """One line of a run's metrics; plain JSON through :meth:`to_json`.

    Attributes:
        round: from 1.
        clients: one row per admitted client: `ranks` its model really had (each distinct one),
            `num_examples`, `bytes_up`, `update_norm`, `cosine` of its change to the server's, and
            `metrics`, what it said about itself.
        refused: who was not admitted and why.
        silent: who was sent a payload and never answered.
        dropped: who was invited and dropped out before it was sent one.
        norm_bound: of the changes admitted this round.
        metrics: means over the admitted clients, weighted by their examples.
        bytes_up: of the admitted updates, at the wire's precision.
        bytes_down: of the payloads sent.
        seconds: per phase.
        spectra: of the global adapter after the round.
        retention: rank -> share of a direction that a round without training keeps; empty if
            nobody was admitted.
    """

    round: int
    clients: Mapping[str, Row]
    refused: tuple[Refusal, ...]
    silent: tuple[str, ...]
    norm_bound: float
    metrics: Mapping[str, float]
    bytes_up: int
    bytes_down: int
    seconds: Mapping[str, float]
    spectra: Mapping[str, Any]
    retention: Mapping[str, float]
    dropped: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether nobody was admitted, so that the model is as it was."""
        return not self.clients

    def to_json(self) -> dict[str, Any]:
        """The record as `json.dumps` takes it."""
        return {**asdict(self), "empty": self.empty}


def run_round(
    method: Method,
    state: ServerState,
    cohort: Sequence[Client],
    engine: Engine,
    spool: Spool,
    rules: Rules | None = None,
) -> tuple[ServerState, RoundRecord]:
    """One round: send, train, admit, aggregate, record.

    A refused update is recorded and the round is, bit for bit, the round without that client. With
    nobody admitted the state keeps its model and only `round` advances. The result does not depend
    on the order of `cohort` or of the answers.

    Args:
        method: what is sent and how it is averaged.
        state: after the previous round.
        cohort: who takes part.
        engine: where they train.
        spool: holds the admitted updates of this round; cleared at the end.
        rules: limits and telemetry.

    Raises:
        ValueError: a client twice in the cohort, or a method that broke its contract (wrong ranks
            in a payload, a round that does not advance).
    """
    rules, clock = rules or Rules(), Stopwatch()
    clients = {c.id: c for c in sorted(cohort, key=lambda c: c.id)}
    if len(clients) < len(cohort):
        raise ValueError(f"round {state.round + 1}: a client is in the cohort twice.")
    bound = norm_bound(state, rules.limits)
    sent = {c.id: _checked(method, method.downlink(state, c), c) for c in clients.values()}
    clock.lap("downlink")
    with spool:
        rows: dict[str, Row] = {}
        refused: list[Refusal] = []
        for answer in engine.train(tuple(sent.values()), clients) if sent else ():
            clock.lap("train")
            try:
                update = _receive(answer, sent, clients, rows, bound, rules.limits)
                spool.add(update)
                rows[update.client] = _row(update, sent[update.client], state)
            except Refused as error:
                refused.append(error.refusal)
            clock.lap("admit")
        clock.lap("train")
        rows = {c: rows[c] for c in sent if c in rows}
        after = _step(method, state, spool, rows, rules.limits)
        clock.lap("aggregate")
        if rows and rules.cosines:
            cosines = telemetry.cosines(state, after, spool, sent)
            rows = {c: {**row, "cosine": cosines[c]} for c, row in rows.items()}
        retention = telemetry.retention(spool) if rows else {}
    levels = rules.levels or telemetry.levels(clients.values())
    spectra = telemetry.spectra(after, levels, rules.per_module)
    clock.lap("telemetry")
    answered = rows.keys() | {r.client for r in refused}
    return after, RoundRecord(
        round=after.round,
        clients=rows,
        refused=tuple(sorted(refused, key=lambda r: (r.client, r.reason))),
        silent=tuple(c for c in sent if c not in answered),
        norm_bound=bound,
        metrics=_means(rows.values()),
        bytes_up=sum(row["bytes_up"] for row in rows.values()),
        bytes_down=sum(telemetry.download_bytes(p, state.wire) for p in sent.values()),
        seconds=clock.seconds,
        spectra=spectra,
        retention=retention,
    )


def _checked(method: Method, payload: Payload, client: Client) -> Payload:
    """The payload, at the ranks its client is configured with: admission then holds it to them."""
    for module, rank in ranks_of(payload.adapter).items():
        wanted = client.lora.rank(module)
        if rank != wanted and module not in payload.mask and not (method.prunes and rank < wanted):
            raise ValueError(
                f"method {method.name!r}, round {payload.round}, client {client.id!r}, module "
                f"{module!r}: the payload has rank {rank}, the client is configured with {wanted}."
            )
    return payload


def _receive(
    answer: Update | Refusal,
    sent: Mapping[str, Payload],
    clients: Mapping[str, Client],
    admitted: Mapping[str, Row],
    bound: float,
    limits: Limits,
) -> Update:
    """One answer through the boundary."""
    name = getattr(answer, "client", None)
    if not isinstance(name, str) or name not in sent:
        message = "an answer of a client that is not in this round's cohort."
        raise Refused(Reason.UNKNOWN_CLIENT, message, "unknown")
    if isinstance(answer, Refusal):
        raise Refused(answer.reason, answer.message, name)
    enrolled = clients[name].num_examples
    return admit(answer, sent[name], enrolled, bound, admitted.keys(), limits.lower_rank)


def _row(update: Update, sent: Payload, state: ServerState) -> Row:
    """What a record keeps of one admitted update."""
    metrics = dict(update.metrics)
    return {
        "ranks": sorted(set(ranks_of(update.adapter).values())),
        "num_examples": update.num_examples,
        "bytes_up": telemetry.upload_bytes(sent, update.adapter, state.wire),
        "update_norm": metrics.pop("update_norm"),
        "metrics": metrics,
    }


def _step(
    method: Method, state: ServerState, spool: Spool, rows: Mapping[str, Row], limits: Limits
) -> ServerState:
    """The state after the round, with the admitted norms behind those of earlier rounds."""
    if not rows:
        return replace(state, round=state.round + 1)
    after = method.aggregate(state, spool)
    if after.round != state.round + 1:
        raise ValueError(
            f"method {method.name!r}: aggregate went from round {state.round} to {after.round}; "
            "it must advance by 1."
        )
    norms = norm_history(state, (row["update_norm"] for row in rows.values()), limits)
    return _laid_out(replace(after, aux={**after.aux, NORMS: norms}))


def _laid_out(state: ServerState) -> ServerState:
    """The state as a checkpoint gives it back: row by row, in its own memory.

    A factorisation may return transposed views, and products of these round differently: without
    this, a run would depend on whether it was interrupted.
    """
    return replace(
        state,
        G={m: g.clone() for m, g in state.G.items()},
        patch={
            m: t.clone() if isinstance(t, LowRank) else t.contiguous().clone()
            for m, t in state.patch.items()
        },
        aux={name: t.contiguous() for name, t in state.aux.items()},
    )


def _means(rows: Iterable[Row]) -> dict[str, float]:
    """Means of the clients' own metrics over those who report them, weighted by examples."""
    sums: dict[str, tuple[float, int]] = {}
    for row in rows:
        for name, value in row["metrics"].items():
            total, weight = sums.get(name, (0.0, 0))
            sums[name] = (total + value * row["num_examples"], weight + row["num_examples"])
    return {name: total / weight for name, (total, weight) in sorted(sums.items())}


class Stopwatch:
    """Seconds per phase: each lap adds the time since the one before to its phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End a phase; it may be entered again."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
