"""Rounds on clients that pull towards target matrices of their own."""

import json
from dataclasses import replace

import pytest
import torch
from federation.quadratic import SHAPES, Quadratic, people, start

from flexlora.adapter import LoraSpec
from flexlora.federation.admission import Reason, Refusal
from flexlora.federation.limits import NORMS, Limits
from flexlora.federation.round import Rules, run_round
from flexlora.federation.run import Schedule, run, suits
from flexlora.federation.sampling import cohort
from flexlora.federation.spool import Spool
from flexlora.federation.state import Method, Update
from flexlora.lowrank import LowRank
from flexlora.methods import make

CLIENTS = people([3, 5, 5, 9])
METHOD = make("flexlora")


def one(tmp_path, cohort=CLIENTS, engine=None, state=None, **rules):
    state = state or start(CLIENTS)
    spool = Spool(10**9, tmp_path)
    return run_round(METHOD, state, cohort, engine or Quadratic(), spool, Rules(**rules))


def same(x, y):
    """Bit for bit, all of the state."""
    assert (x.round, x.base, x.G.keys(), x.aux.keys()) == (
        y.round,
        y.base,
        y.G.keys(),
        y.aux.keys(),
    )
    assert all(torch.equal(x.G[m].B, y.G[m].B) and torch.equal(x.G[m].A, y.G[m].A) for m in x.G)
    assert all(torch.equal(x.aux[k], y.aux[k]) for k in x.aux)


def poisoned(update: Update) -> Update:
    d = update.adapter["layer.0.q_proj"]
    bad = LowRank(d.B * float("nan"), d.A, d.scaling)
    return replace(update, adapter={**update.adapter, "layer.0.q_proj": bad})


def test_a_round_trains_and_records(tmp_path):
    state, record = one(tmp_path)
    assert (state.round, record.round, record.empty) == (1, 1, False)
    assert {c: row["ranks"] for c, row in record.clients.items()} == {
        "c0": [3],
        "c1": [5],
        "c2": [5],
        "c3": [9],
    }
    floats = {r: sum(r * (o + i) for o, i in SHAPES.values()) for r in (3, 5, 9)}
    assert record.clients["c3"]["bytes_up"] == 4 * floats[9]
    assert record.bytes_up == record.bytes_down == 4 * (floats[3] + 2 * floats[5] + floats[9])
    losses = [row["metrics"]["loss"] * row["num_examples"] for row in record.clients.values()]
    assert record.metrics == {"loss": pytest.approx(sum(losses) / 100)}
    assert all(0 < row["cosine"] <= 1 for row in record.clients.values())
    assert record.retention == {"3": 1.0, "5": pytest.approx(0.9), "9": pytest.approx(0.4)}
    assert set(record.seconds) == {"downlink", "train", "admit", "aggregate", "telemetry"}
    assert not record.refused
    assert not record.silent
    assert len(json.dumps(record.to_json())) < 3000
    assert state.aux[NORMS].tolist() == [r["update_norm"] for r in record.clients.values()]


@pytest.mark.parametrize("order", range(4))
def test_the_order_of_cohort_and_answers_does_not_matter(tmp_path, order):
    state, record = one(tmp_path)
    shuffled = [CLIENTS[i] for i in ((2, 0, 3, 1), (3, 2, 1, 0), (1, 3, 0, 2), (0, 1, 2, 3))[order]]
    other, again = one(tmp_path, shuffled, Quadratic(order=order + 1))
    same(state, other)
    assert {**record.to_json(), "seconds": 0} == {**again.to_json(), "seconds": 0}


@pytest.mark.parametrize("bad", ["c0", "c2", "c3"])
def test_one_refused_update_leaves_the_round_without_that_client(tmp_path, bad):
    first, _ = one(tmp_path)
    engine = Quadratic(tamper=lambda u: [poisoned(u) if u.client == bad else u])
    state, record = one(tmp_path, engine=engine, state=first)
    without = [c for c in CLIENTS if c.id != bad]
    same(state, one(tmp_path, without, state=first)[0])
    assert [(r.client, r.reason) for r in record.refused] == [(bad, Reason.NOT_FINITE)]
    assert bad not in record.clients
    assert "NaN" in record.refused[0].message


def test_replays_strangers_and_reports_of_the_engine(tmp_path):
    def tamper(update):
        if update.client == "c0":
            return [Refusal("c0", Reason.MEMORY, "8 GB were not enough")]
        if update.client == "c1":
            return []
        return [update, update, replace(update, client="mallory"), None]

    state, record = one(tmp_path, engine=Quadratic(tamper=tamper))
    same(state, one(tmp_path, CLIENTS[2:])[0])
    found = [(r.client, r.reason.name) for r in record.refused]
    assert found == [
        ("c0", "MEMORY"),
        ("c2", "DUPLICATE"),
        ("c3", "DUPLICATE"),
        *[("unknown", "UNKNOWN_CLIENT")] * 4,
    ]
    assert record.silent == ("c1",)
    assert "mallory" not in json.dumps(record.to_json())


@pytest.mark.parametrize(
    "engine", [Quadratic(tamper=lambda u: []), Quadratic(tamper=lambda u: [poisoned(u)])]
)
def test_a_round_without_anyone_keeps_the_model(tmp_path, engine):
    first, _ = one(tmp_path)
    state, record = one(tmp_path, engine=engine, state=first)
    assert state == replace(first, round=2)
    assert state.G is first.G
    assert record.empty
    assert record.to_json()["empty"] is True
    assert len(record.silent) + len(record.refused) == 4
    nobody, record = one(tmp_path, cohort=[], state=first)
    assert nobody.G is first.G
    assert record.empty


def test_norms_are_bounded_by_earlier_rounds(tmp_path):
    limits = Limits(norm_multiple=3.0)
    state, first = one(tmp_path, limits=limits)
    median = sorted(r["update_norm"] for r in first.clients.values())[1:3]
    loud = Quadratic(
        tamper=lambda u: [u if u.client != "c1" else replace(u, adapter=louder(u, 30.0))]
    )
    after, record = one(tmp_path, engine=loud, state=state, limits=limits)
    assert record.norm_bound == pytest.approx(3 * sum(median) / 2)
    assert [(r.client, r.reason) for r in record.refused] == [("c1", Reason.NORM)]
    same(after, one(tmp_path, [c for c in CLIENTS if c.id != "c1"], state=state, limits=limits)[0])


def louder(update, factor):
    return {m: LowRank(factor * d.B, d.A, d.scaling) for m, d in update.adapter.items()}


def test_memory_of_the_norms_survives_a_method_that_forgets(tmp_path):
    forgetful = replace(METHOD, aggregate=lambda s, u: replace(METHOD.aggregate(s, u), aux={}))
    state = start(CLIENTS)
    for _ in range(2):
        state, _ = run_round(forgetful, state, CLIENTS, Quadratic(), Spool(0, tmp_path))
    assert len(state.aux[NORMS]) == 8


def test_on_disk_or_in_memory_is_the_same(tmp_path):
    state, _ = run_round(METHOD, start(CLIENTS), CLIENTS, Quadratic(), Spool(0, tmp_path / "a"))
    same(state, one(tmp_path)[0])
    assert list((tmp_path / "a").iterdir()) == []


def test_methods_are_held_to_their_contract(tmp_path):
    spool = Spool(0, tmp_path)

    def flat(state, client):
        return METHOD.downlink(state, replace(client, lora=LoraSpec(3, 24.0)))

    with pytest.raises(ValueError, match=r"'c1'.* has rank 3, the client is configured with 5"):
        run_round(replace(METHOD, downlink=flat), start(CLIENTS), CLIENTS, Quadratic(), spool)
    pruning = replace(METHOD, downlink=flat, prunes=True)
    _, record = run_round(pruning, start(CLIENTS), CLIENTS, Quadratic(), spool)
    assert all(row["ranks"] == [3] for row in record.clients.values())
    stuck = replace(METHOD, aggregate=lambda state, updates: state)
    with pytest.raises(ValueError, match="must advance by 1"):
        run_round(stuck, start(CLIENTS), CLIENTS, Quadratic(), spool)
    with pytest.raises(ValueError, match="cohort twice"):
        run_round(METHOD, start(CLIENTS), CLIENTS + CLIENTS[:1], Quadratic(), spool)


def test_a_run_learns_and_resumes_exactly(tmp_path):
    people_ = people([3, 5, 5, 9, 3, 3])
    schedule = Schedule(rounds=8, cohort_size=4, drop_out=0.3)

    def go(state):
        return list(run(METHOD, state, people_, Quadratic(), schedule, Spool(10**9, tmp_path)))

    states, records = zip(*go(start(people_)), strict=True)
    assert [r.round for r in records] == list(range(1, 9))
    ids = [c.id for c in people_]
    for r in records:
        took_part = {*r.clients, *r.dropped}
        assert took_part == set(cohort(3, r.round, ids, 4))
        assert set(r.spectra["captured"]) == {"3", "5", "9"}
    assert any(r.dropped for r in records)
    assert records[-1].metrics["loss"] < 0.8 * records[0].metrics["loss"]
    resumed = go(states[4])
    assert [r.round for _, r in resumed] == [6, 7, 8]
    same(resumed[-1][0], states[-1])


def test_what_does_not_fit_is_refused_before_anything_starts(tmp_path):
    mixed, equal = people([3, 5]), people([3, 3])
    stateful = replace(METHOD, stateless=False)

    def refuse(method: Method, clients, said, **schedule):
        plan = Schedule(**{"rounds": 1, "cohort_size": 1, **schedule})
        with pytest.raises(ValueError, match=said):
            run(method, start(clients), clients, Quadratic(), plan, Spool(0, tmp_path))

    refuse(make("fedavg"), mixed, "needs one rank for all 2 clients, and they have 3, 5")
    refuse(stateful, mixed, "cross-device clients do not")
    refuse(METHOD, mixed, "everyone takes part", setting="cross-silo")
    refuse(METHOD, [*mixed, mixed[0]], "unique")
    suits(make("fedavg"), equal, Schedule(1, 1))
    suits(stateful, mixed, Schedule(1, 2, setting="cross-silo"))


def test_honest_updates_pass_over_ranks_and_data_sizes(tmp_path):
    """At most 1 % of honest updates refused: ranks 4 to 64, a tenfold spread of local steps."""
    shapes = {"q_proj": (64, 72)}
    ranks, steps, refused, answers = (4, 8, 16, 32, 64), (3, 6, 12, 30), 0, 0
    for rare in (4, 64):  # the median sits at the other end of the spread
        pool = [r for r in ranks for _ in range(1 if r == rare else 4)]
        clients = people(pool, alpha=16.0)
        engine = Quadratic({c.id: steps[i % 4] for i, c in enumerate(clients)}, 0.003)
        state = start(clients, shapes)
        for _ in range(3):
            state, record = run_round(METHOD, state, clients, engine, Spool(10**9, tmp_path))
            refused, answers = refused + len(record.refused), answers + len(clients)
    assert refused <= 0.01 * answers
