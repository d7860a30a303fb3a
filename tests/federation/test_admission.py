"""Hostile updates of many kinds: each refused, with its reason, whatever the seed."""

import math
from dataclasses import replace

import pytest
import torch
from federation.quadratic import SHAPES
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.federation.admission import Reason, Refused, admit, change_norm
from flexlora.federation.limits import NORMS, Limits, norm_bound, norm_history
from flexlora.federation.state import Payload, ServerState, Update
from flexlora.federation.telemetry import changed
from flexlora.lowrank import LowRank

ENROLLED = 50
Q, UP = SHAPES


def random_product(shape, rank, scaling, generator):
    d_out, d_in = shape
    B = torch.randn(d_out, rank, generator=generator)
    return LowRank(B, torch.randn(rank, d_in, generator=generator), scaling)


def exchange(seed, rank=5, train="AB", keep=""):
    """A payload and an honest answer to it."""
    g = torch.Generator().manual_seed(seed)
    sent = {m: random_product(s, rank, 1.6, g) for m, s in SHAPES.items()}
    moved = {
        m: LowRank(
            d.B + (0.1 * torch.randn(d.B.shape, generator=g) if "B" in train else 0),
            d.A + (0.1 * torch.randn(d.A.shape, generator=g) if "A" in train else 0),
            d.scaling,
        )
        for m, d in sent.items()
    }
    payload = Payload("anna", 4, "base", sent, train=train, keep=keep)
    return payload, Update("anna", 4, "base", moved, 40, {"loss": 1.5})


def at(update, module, **parts):
    """The update with one product's parts replaced."""
    d = update.adapter[module]
    B, A = parts.get("B", d.B), parts.get("A", d.A)
    changed = LowRank(B, A, parts.get("scaling", d.scaling))
    return replace(update, adapter={**update.adapter, module: changed})


def poke(x, value, g):
    """A copy with one random entry replaced."""
    x = x.clone()
    x.view(-1)[torch.randint(x.numel(), (1,), generator=g)] = value
    return x


def only(*modules):
    return lambda u, g: replace(u, adapter={m: u.adapter[m] for m in modules})


def extra(name):
    return lambda u, g: replace(u, adapter={**u.adapter, name: u.adapter[Q]})


def field(**changes):
    return lambda u, g: replace(u, **changes)


def part(module, name, change):
    return lambda u, g: at(u, module, **{name: change(getattr(u.adapter[module], name), g)})


HOSTILE = {
    "NaN in B": (Reason.NOT_FINITE, part(Q, "B", lambda x, g: poke(x, math.nan, g))),
    "NaN in A": (Reason.NOT_FINITE, part(UP, "A", lambda x, g: poke(x, math.nan, g))),
    "inf in B": (Reason.NOT_FINITE, part(Q, "B", lambda x, g: poke(x, math.inf, g))),
    "-inf in A": (Reason.NOT_FINITE, part(UP, "A", lambda x, g: poke(x, -math.inf, g))),
    "all NaN": (Reason.NOT_FINITE, part(Q, "B", lambda x, g: x * math.nan)),
    "1e20 in B": (Reason.NORM, part(Q, "B", lambda x, g: poke(x, 1e20, g))),
    "1e38 everywhere": (Reason.NORM, part(Q, "A", lambda x, g: torch.full_like(x, 1e38))),
    "1e300 in float64": (
        Reason.NORM,
        lambda u, g: at(u, Q, B=u.adapter[Q].B.double() * 1e300, A=u.adapter[Q].A.double()),
    ),
    "scaled by 1000": (Reason.NORM, part(Q, "B", lambda x, g: 1000 * x)),
    "sign flipped and boosted": (Reason.NORM, part(UP, "A", lambda x, g: -300 * x)),
    "huge A hidden by B of zero": (
        Reason.NORM,
        lambda u, g: at(u, Q, B=0 * u.adapter[Q].B, A=1e12 * u.adapter[Q].A),
    ),
    "huge B hidden by A of zero": (
        Reason.NORM,
        lambda u, g: at(u, Q, B=1e12 * u.adapter[Q].B, A=0 * u.adapter[Q].A),
    ),
    "huge A against tiny B": (
        Reason.NORM,
        lambda u, g: at(u, Q, B=1e-9 * u.adapter[Q].B, A=1e9 * u.adapter[Q].A),
    ),
    "transposed B": (Reason.SHAPE, part(Q, "B", lambda x, g: x.T)),
    "B of another module": (Reason.SHAPE, lambda u, g: at(u, Q, B=u.adapter[UP].B)),
    "one row short": (Reason.SHAPE, part(Q, "B", lambda x, g: x[1:])),
    "one column more": (Reason.SHAPE, part(Q, "A", lambda x, g: torch.cat([x, x[:, :1]], 1))),
    "broadcastable row": (Reason.SHAPE, part(Q, "B", lambda x, g: x[:1])),
    "broadcastable column": (Reason.SHAPE, part(Q, "A", lambda x, g: x[:, :1])),
    "scalar": (Reason.SHAPE, part(Q, "A", lambda x, g: x.sum())),
    "vector": (Reason.SHAPE, part(Q, "B", lambda x, g: x.flatten())),
    "three dimensions": (Reason.SHAPE, part(Q, "B", lambda x, g: x[None])),
    "empty": (Reason.SHAPE, part(Q, "B", lambda x, g: x[:0])),
    "rank lower": (Reason.RANK, lambda u, g: at(u, Q, **_cut(u.adapter[Q], 4))),
    "rank lower everywhere": (
        Reason.RANK,
        lambda u, g: replace(u, adapter={m: d.prefix(2) for m, d in u.adapter.items()}),
    ),
    "rank lower and declared": (
        Reason.RANK,
        lambda u, g: replace(
            u, adapter={m: d.prefix(2) for m, d in u.adapter.items()}, reduced=True
        ),
    ),
    "rank 0": (Reason.RANK, lambda u, g: at(u, Q, **_cut(u.adapter[Q], 0))),
    "rank higher": (
        Reason.RANK,
        lambda u, g: at(
            u,
            Q,
            B=torch.cat([u.adapter[Q].B, u.adapter[Q].B], 1),
            A=torch.cat([u.adapter[Q].A, u.adapter[Q].A]),
        ),
    ),
    "broadcastable rank": (Reason.RANK, part(Q, "B", lambda x, g: x[:, :1])),
    "ranks disagree": (Reason.RANK, part(Q, "A", lambda x, g: x[:3])),
    "integers": (Reason.DTYPE, part(Q, "B", lambda x, g: x.long())),
    "booleans": (Reason.DTYPE, part(Q, "A", lambda x, g: x > 0)),
    "complex": (Reason.DTYPE, part(Q, "A", lambda x, g: x.to(torch.complex64))),
    "float8": (Reason.DTYPE, part(Q, "B", lambda x, g: x.to(torch.float8_e4m3fn))),
    "two dtypes": (Reason.DTYPE, part(Q, "B", lambda x, g: x.double())),
    "sparse": (Reason.DTYPE, part(Q, "B", lambda x, g: x.to_sparse())),
    "no storage": (Reason.DTYPE, part(Q, "B", lambda x, g: x.to("meta"))),
    "scaling doubled": (Reason.SCALING, lambda u, g: at(u, Q, scaling=3.2)),
    "scaling NaN": (Reason.SCALING, lambda u, g: at(u, Q, scaling=math.nan)),
    "scaling a string": (Reason.SCALING, lambda u, g: at(u, Q, scaling="SECRET")),
    "module missing": (Reason.MODULES, only(Q)),
    "no modules": (Reason.MODULES, only()),
    "module added": (Reason.MODULES, extra("SECRET text")),
    "module renamed": (
        Reason.MODULES,
        lambda u, g: replace(u, adapter={Q: u.adapter[Q], "SECRET": u.adapter[UP]}),
    ),
    "a list for an adapter": (Reason.MALFORMED, field(adapter=[])),
    "a number for a product": (
        Reason.MALFORMED,
        lambda u, g: replace(u, adapter={**u.adapter, Q: 3}),
    ),
    "a list for a tensor": (Reason.MALFORMED, part(Q, "B", lambda x, g: x.tolist())),
    "not an update": (Reason.MALFORMED, lambda u, g: {"client": "anna"}),
    "nothing": (Reason.MALFORMED, lambda u, g: None),
    "no examples": (Reason.EXAMPLES, field(num_examples=0)),
    "negative examples": (Reason.EXAMPLES, field(num_examples=-3)),
    "one example too many": (Reason.EXAMPLES, field(num_examples=ENROLLED + 1)),
    "1e15 examples": (Reason.EXAMPLES, field(num_examples=10**15)),
    "examples beyond floats": (Reason.EXAMPLES, field(num_examples=10**5000)),
    "fractional examples": (Reason.EXAMPLES, field(num_examples=1.5)),
    "NaN examples": (Reason.EXAMPLES, field(num_examples=math.nan)),
    "examples True": (Reason.EXAMPLES, field(num_examples=True)),
    "examples in words": (Reason.EXAMPLES, field(num_examples="SECRET")),
    "stale round": (Reason.ROUND, field(round=3)),
    "future round": (Reason.ROUND, field(round=5)),
    "round 4.0": (Reason.ROUND, field(round=4.0)),
    "other base": (Reason.BASE, field(base="SECRET")),
    "no base": (Reason.BASE, field(base=None)),
    "another's id": (Reason.UNKNOWN_CLIENT, field(client="SECRET")),
    "no id": (Reason.UNKNOWN_CLIENT, field(client=None)),
}


def _cut(d, rank):
    return {"B": d.B[:, :rank], "A": d.A[:rank]}


def test_there_are_many_kinds():
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_updates_are_refused(kind, seed):
    reason, attack = HOSTILE[kind]
    sent, honest = exchange(seed)
    bad = attack(honest, torch.Generator().manual_seed(seed))
    with pytest.raises(Refused) as refused:
        admit(bad, sent, ENROLLED, bound=200.0)
    assert refused.value.reason is reason
    assert refused.value.refusal.client == "anna"
    assert str(refused.value).startswith("round 4, client 'anna': ")
    assert "SECRET" not in str(refused.value)
    admit(honest, sent, ENROLLED, bound=200.0)


def test_a_replay_is_a_duplicate():
    sent, honest = exchange(0)
    with pytest.raises(Refused, match="already in this round") as refused:
        admit(honest, sent, ENROLLED, seen={"anna"})
    assert refused.value.reason is Reason.DUPLICATE


def test_what_is_admitted_is_the_servers_own_view():
    sent, honest = exchange(1)
    noisy = {"loss": 1.5, "x": math.nan, "SECRET TEXT": 1.0, "y": "text", 3: 1.0, "z": 10**400}
    shuffled = dict(reversed(honest.adapter.items()))
    leaf = shuffled[Q].B.clone().requires_grad_()
    shuffled[Q] = LowRank(leaf, shuffled[Q].A, shuffled[Q].scaling)
    admitted = admit(replace(honest, metrics=noisy, adapter=shuffled), sent, ENROLLED)
    assert list(admitted.adapter) == list(sent.adapter)
    assert not admitted.adapter[Q].B.requires_grad
    assert torch.equal(admitted.adapter[Q].B, honest.adapter[Q].B)
    assert set(admitted.metrics) == {"loss", "update_norm"}
    moved = sum((honest.adapter[m].dense() - sent.adapter[m].dense()).norm() ** 2 for m in SHAPES)
    assert admitted.metrics["update_norm"] == pytest.approx(math.sqrt(moved), rel=1e-5)


def test_metrics_are_few():
    sent, honest = exchange(1)
    flood = replace(honest, metrics={f"m{i}": 1.0 for i in range(10_000)})
    assert len(admit(flood, sent, ENROLLED).metrics) <= 65


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_is_admitted_as_it_came(dtype):
    sent, honest = exchange(2)
    cast = {m: d.to(dtype) for m, d in honest.adapter.items()}
    admitted = admit(replace(honest, adapter=cast), sent, ENROLLED)
    assert admitted.adapter[UP].A.dtype == dtype


@pytest.mark.parametrize(
    ("train", "keep", "frozen"), [("B", "", "A"), ("A", "", "B"), ("AB", "B", "B")]
)
def test_a_factor_that_does_not_travel_is_the_payloads(train, keep, frozen):
    sent, honest = exchange(3, train=train.replace(keep, "") if keep else train)
    sent = replace(sent, train=train, keep=keep)
    admit(honest, sent, ENROLLED)
    bad = part(Q, frozen, lambda x, g: poke(x, 0.5, g))(honest, torch.Generator())
    with pytest.raises(Refused, match=f"{frozen} differs from what was sent"):
        admit(bad, sent, ENROLLED)


def test_a_lower_rank_needs_to_be_declared_and_allowed():
    sent, honest = exchange(4)
    small = replace(honest, adapter={m: d.prefix(2) for m, d in honest.adapter.items()})
    with pytest.raises(Refused, match="declared and allowed"):
        admit(small, sent, ENROLLED, lower_rank=True)
    admitted = admit(replace(small, reduced=True), sent, ENROLLED, lower_rank=True)
    assert admitted.adapter[Q].rank == 2
    grown = {m: random_product(s, 6, 1.6, torch.Generator()) for m, s in SHAPES.items()}
    with pytest.raises(Refused, match="or lower"):
        admit(replace(honest, adapter=grown, reduced=True), sent, ENROLLED, lower_rank=True)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3))
def test_mutated_updates_are_refused_or_valid(seed, mutations):
    """Kinds on top of each other: nothing but `Refused`, and nothing invalid is admitted."""
    g = torch.Generator().manual_seed(seed)
    sent, update = exchange(seed)
    kinds = list(HOSTILE.values())
    for _ in range(mutations):
        try:
            update = kinds[int(torch.randint(len(kinds), (1,), generator=g))][1](update, g)
        except (TypeError, AttributeError, LookupError, RuntimeError, NotImplementedError):
            break  # the mutation does not fit what the one before left
    try:
        admitted = admit(update, sent, ENROLLED, bound=200.0)
    except Refused:
        return
    assert {m: (d.shape, d.rank) for m, d in admitted.adapter.items()} == {
        m: (d.shape, d.rank) for m, d in sent.adapter.items()
    }
    assert change_norm(admitted.adapter, sent.adapter) <= 200


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6), st.booleans())
def test_the_change_is_the_dense_one(seed, rank, fresh):
    g = torch.Generator().manual_seed(seed)
    sent = random_product((9, 7), 6, 0.7, g)
    sent = LowRank(sent.B * 0, sent.A, 0.7) if fresh else sent
    d = random_product((9, 7), rank, 0.7, g)
    dense = d.dense() - sent.prefix(rank).dense()
    assert torch.allclose(changed(d, sent).dense(), dense, atol=1e-5)
    small = sent.prefix(rank)
    three = dense.norm(), 0.7 * (d.B - small.B).norm(), (d.A - small.A).norm()
    assert change_norm({"m": d}, {"m": sent}) == pytest.approx(max(three).item(), rel=1e-4)


def test_the_norm_of_a_small_change_keeps_its_digits():
    g = torch.Generator().manual_seed(0)
    sent = random_product((200, 100), 8, 2.0, g)
    nudge = 1e-5 * torch.randn(200, 8, generator=g)
    moved = LowRank(sent.B + nudge, sent.A, 2.0)
    exact = (2.0 * (moved.B.double() - sent.B.double()) @ sent.A.double()).norm().item()
    assert change_norm({"m": moved}, {"m": sent}) == pytest.approx(exact, rel=1e-5)


def test_bounds_follow_earlier_rounds_only():
    state, limits = ServerState(0, "base", {}), Limits(first_norm=50.0, norm_multiple=4.0, window=4)
    assert norm_bound(state, limits) == 50.0
    state = replace(state, aux={NORMS: norm_history(state, [1.0, 2.0, 3.0], limits)})
    assert norm_bound(state, limits) == 8.0
    state = replace(state, aux={NORMS: norm_history(state, [7.0, 7.0, 7.0], limits)})
    assert state.aux[NORMS].tolist() == [3.0, 7.0, 7.0, 7.0]
    assert norm_bound(state, limits) == 28.0
    idle = replace(state, aux={NORMS: norm_history(ServerState(0, "", {}), [0.0, 0.0], limits)})
    assert norm_bound(idle, limits) == 50.0


def test_limits_that_make_no_sense_are_refused():
    for bad in ({"first_norm": 0.0}, {"norm_multiple": 0.5}, {"window": 0}):
        with pytest.raises(ValueError, match="expected first_norm > 0"):
            Limits(**bad)
