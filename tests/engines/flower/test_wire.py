"""Bytes in and out: lossless where they should be, refused where they are not as asked for."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from federation.quadratic import Quadratic, people, start
from safetensors.torch import save

from flexlora.adapter import to_tensors
from flexlora.engines.flower.answers import decode_update, encode_update, largest
from flexlora.engines.flower.wire import decode_payload, digest, encode_payload
from flexlora.federation.admission import Reason, Refused, admit
from flexlora.federation.round import run_round
from flexlora.federation.spool import Spool
from flexlora.federation.state import Client, Payload, Penalty, Update
from flexlora.lowrank import LowRank, Mask
from flexlora.methods import make

CLIENTS = people([2, 4, 8])


def sent_to(client: Client = CLIENTS[1], wire: str = "float32", method: str = "flexlora"):
    state = start(CLIENTS, wire=wire)
    payload = make(method).downlink(state, client)
    return payload, digest(encode_payload(payload, wire, "run"))


def answer(wire: str = "float32") -> tuple[bytes, Payload, str]:
    payload, answers = sent_to(wire=wire)
    update = Quadratic().one(payload, CLIENTS[1])
    return encode_update(update, payload, answers, wire), payload, answers


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["flexlora", "fedavg", "ffa-lora", "rolora", "hetlora"])
def test_a_payload_survives_the_wire(method, wire):
    client = replace(CLIENTS[0], lora=CLIENTS[2].lora) if method != "flexlora" else CLIENTS[1]
    payload, _ = sent_to(client, wire, method)
    back = decode_payload(encode_payload(payload, wire))
    for name, tensor in to_tensors(payload.adapter).items():
        assert torch.equal(tensor, to_tensors(back.adapter)[name])
    assert replace(back, adapter={}) == replace(payload, adapter={})
    assert [d.scaling for d in back.adapter.values()] == [
        d.scaling for d in payload.adapter.values()
    ]


def test_frozen_terms_masks_penalties_and_scalings_travel():
    adapter = {"q": LowRank(torch.zeros(3, 1), torch.ones(1, 1), 0.5)}
    frozen = {"q": (torch.ones(5, 7), LowRank(torch.ones(5, 2), torch.ones(2, 7), 0.25))}
    payload = Payload(
        "c",
        3,
        "base",
        adapter,
        frozen,
        "B",
        "",
        "",
        9,
        {"q": Mask((5, 7), 3, 4)},
        Penalty("prox", 2.0),
    )
    back = decode_payload(encode_payload(payload, "bfloat16"))
    assert (back.mask, back.penalty, back.train) == (payload.mask, payload.penalty, "B")
    dense, product = back.frozen["q"]
    assert torch.equal(dense, torch.ones(5, 7))
    assert product.scaling == 0.25


def test_factors_that_a_client_can_draw_do_not_travel():
    payload, _ = sent_to(replace(CLIENTS[1], lora=CLIENTS[2].lora), method="ffa-lora")
    assert payload.known == "A"
    known, all_of_it = (
        len(encode_payload(p, "float32")) for p in (payload, replace(payload, known=""))
    )
    saved = sum(d.A.nbytes for d in payload.adapter.values())
    assert abs(all_of_it - known - saved) < 400


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_an_update_survives_the_wire(wire):
    payload, answers = sent_to(wire=wire)
    update = Quadratic().one(payload, CLIENTS[1])
    data = encode_update(update, payload, answers, wire)
    back = decode_update(data, payload, answers, wire)
    for module, d in update.adapter.items():
        want = d.to(getattr(torch, wire)).to(torch.float32)
        assert torch.equal(back.adapter[module].B, want.B)
        assert torch.equal(back.adapter[module].A, want.A)
    assert back.metrics == update.metrics
    assert len(data) <= largest(payload, wire)[1]
    admit(back, payload, 20)


def reframed(data: bytes, change: Callable[[dict], object]) -> bytes:
    """The same file with its header changed in place."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def about(**changes) -> Callable[[bytes], bytes]:
    def change(header: dict) -> None:
        rest = json.loads(header["__metadata__"]["flexlora"]) | changes
        header["__metadata__"]["flexlora"] = json.dumps(rest)

    return lambda data: reframed(data, change)


def entry(**changes) -> Callable[[bytes], bytes]:
    def change(header: dict) -> None:
        header[next(k for k in header if k != "__metadata__")].update(changes)

    return lambda data: reframed(data, change)


def values(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[bytes], bytes]:
    """The same file with one tensor's numbers changed, by whoever holds a key."""

    def made(data: bytes) -> bytes:
        _, payload, answers = answer()
        update = decode_update(data, payload, answers, "float32")
        module, d = next(iter(update.adapter.items()))
        adapter = {**update.adapter, module: LowRank(change(d.B), d.A, d.scaling)}
        return encode_update(replace(update, adapter=adapter), payload, answers, "float32")

    return made


def renamed(old: str, new: str | None) -> Callable[[bytes], bytes]:
    def change(header: dict) -> None:
        moved = header.pop(old)
        if new is not None:
            header[new] = moved

    return lambda data: reframed(data, change)


Q = "layer.0.q_proj"
HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda d: b"",
    "seven bytes": lambda d: d[:7],
    "truncated body": lambda d: d[:-1],
    "truncated header": lambda d: d[:60],
    "trailing bytes": lambda d: d + b"\0",
    "ten times as long": lambda d: d * 10,
    "header bomb": lambda d: struct.pack("<Q", 1 << 62) + d[8:],
    "header one too long": lambda d: struct.pack("<Q", len(d) - 7) + d[8:],
    "empty header": lambda d: struct.pack("<Q", 0) + d[8:],
    "deeply nested header": lambda d: reframed(d, lambda h: b"[" * 30_000),
    "a number of 20,000 digits": lambda d: reframed(d, lambda h: b'{"a":' + b"9" * 20_000 + b"}"),
    "header no object": lambda d: reframed(d, lambda h: b"[1, 2]"),
    "header not text": lambda d: reframed(d, lambda h: b"\xff\xfe{}"),
    "a key twice": lambda d: reframed(
        d, lambda h: json.dumps(h).encode()[:-1] + b',"layer.0.q_proj/A":{}}'
    ),
    "no metadata": lambda d: reframed(d, lambda h: h.pop("__metadata__") and None),
    "metadata no object": lambda d: reframed(d, lambda h: h.update(__metadata__=[1])),
    "metadata not JSON": lambda d: reframed(d, lambda h: h["__metadata__"].update(flexlora="{")),
    "pickle": lambda d: b"\x80\x04\x95" + d[3:],
    "wrong dtype tag": entry(dtype="I32"),
    "narrower dtype tag": entry(dtype="BF16"),
    "unknown dtype tag": entry(dtype="F1024"),
    "dtype no string": entry(dtype=32),
    "one dimension": entry(shape=[8]),
    "three dimensions": entry(shape=[4, 20, 1]),
    "broadcastable": entry(shape=[4, 1]),
    "transposed": entry(shape=[20, 4]),
    "negative shape": entry(shape=[-4, -20]),
    "shape of booleans": entry(shape=[True, True]),
    "shape of floats": entry(shape=[4.0, 20.0]),
    "huge rank": entry(shape=[1 << 40, 20]),
    "rank 0": entry(shape=[0, 20]),
    "offsets beyond the end": entry(data_offsets=[0, 1 << 50]),
    "negative offsets": entry(data_offsets=[-320, 0]),
    "overlapping": entry(data_offsets=[320, 640]),
    "offsets no numbers": entry(data_offsets=["a", "b"]),
    "no offsets": entry(data_offsets=None),
    "entry no object": lambda d: reframed(d, lambda h: h.update({f"{Q}/A": 7})),
    "missing tensor": renamed(f"{Q}/A", None),
    "extra name": renamed(f"{Q}/A", "layer.9.q_proj/A"),
    "another run's payload": about(answers=digest(b"another run")),
    "no payload named": about(answers=None),
    "another client": about(client="c0"),
    "stale round": about(round=0),
    "round no number": about(round="1"),
    "round true": about(round=True),
    "other base": about(base="other"),
    "zero examples": about(num_examples=0),
    "negative examples": about(num_examples=-5),
    "1e15 examples": about(num_examples=10**15),
    "more examples than enrolled": about(num_examples=10_000),
    "examples not whole": about(num_examples=2.5),
    "examples infinite": about(num_examples=float("inf")),
    "NaN": values(lambda x: x.clone().fill_(float("nan"))),
    "infinity": values(lambda x: x.clone().fill_(float("inf"))),
    "1e20": values(lambda x: x + 1e20),
    "far beyond the norm": values(lambda x: x + 1e4),
    "undeclared lower rank": lambda d: lower_rank(d, reduced=False),
    "PEFT's own file": lambda d: save({"lora_A.weight": torch.ones(4, 20)}),
}  # fmt: skip


def lower_rank(data: bytes, reduced: bool) -> bytes:
    _, payload, answers = answer()
    update = decode_update(data, payload, answers, "float32")
    adapter = {m: d.prefix(2).clone() for m, d in update.adapter.items()}
    return encode_update(
        replace(update, adapter=adapter, reduced=reduced), payload, answers, "float32"
    )


def received(data: bytes, payload: Payload, answers: str, enrolled: int = 20) -> Update:
    """The whole boundary: bytes, then values."""
    return admit(decode_update(data, payload, answers, "float32"), payload, enrolled, 1e3, (), True)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_update_is_refused_with_a_reason(kind):
    data, payload, answers = answer()
    with pytest.raises(Refused) as caught:
        received(HOSTILE[kind](data), payload, answers)
    assert caught.value.reason in Reason
    assert caught.value.refusal.client == "c1"


def test_there_are_at_least_40_kinds():
    assert len(HOSTILE) >= 40


def test_a_declared_fallback_to_a_lower_rank_is_taken():
    data, payload, answers = answer()
    assert received(lower_rank(data, reduced=True), payload, answers).adapter[Q].rank == 2


@pytest.mark.parametrize("seed", range(3))
def test_a_round_with_hostile_updates_is_the_round_without_those_clients(tmp_path, seed):
    """Every kind, one a client, among honest clients; the state must agree bit for bit."""
    kinds = list(HOSTILE)
    rng = random.Random(seed)
    clients = people([rng.choice([2, 4, 8]) for _ in kinds] + [2, 4, 8])
    hostile = {c.id: kind for c, kind in zip(clients, kinds, strict=False)}
    state, method = start(clients), make("flexlora")

    class Wired:
        def train(self, payloads, people):
            for payload in payloads:
                answers = digest(encode_payload(payload, "float32", "run"))
                update = Quadratic().one(payload, people[payload.client])
                data = encode_update(update, payload, answers, "float32")
                try:
                    if payload.client in hostile:
                        data = tampered(data, hostile[payload.client], seed)
                    yield decode_update(data, payload, answers, "float32")
                except Refused as refused:
                    yield refused.refusal

    spool = Spool(1 << 30, tmp_path)
    after, record = run_round(method, state, clients, Wired(), spool)
    honest = [c for c in clients if c.id not in hostile]
    alone, _ = run_round(method, state, honest, Wired(), spool)
    assert set(record.clients) == {c.id for c in honest}
    assert len(record.refused) == len(hostile)
    for module, g in after.G.items():
        assert torch.equal(g.B, alone.G[module].B)
        assert torch.equal(g.A, alone.G[module].A)


def tampered(data: bytes, kind: str, seed: int) -> bytes:
    """A kind that fits any client: those that need this file's one client become noise."""
    try:
        return HOSTILE[kind](data)
    except Refused:
        return random.Random(seed).randbytes(len(data))


MUTATIONS = int(os.environ.get("FLEXLORA_MUTATIONS", "2000"))


def test_mutated_updates_never_crash_and_none_is_admitted_that_is_not_valid():
    """FLEXLORA_MUTATIONS=100000 for the whole fuzz. An accepted one must be valid by itself."""
    data, payload, answers = answer()
    rng, taken = random.Random(MUTATIONS), 0
    size = 8 + int.from_bytes(data[:8], "little")
    for _ in range(MUTATIONS):
        mutated = mutate(data, rng, size)
        try:
            update = received(mutated, payload, answers)
        except Refused:
            continue
        taken += 1
        for module, d in update.adapter.items():
            want = payload.adapter[module]
            assert d.shape == want.shape
            assert d.rank <= want.rank
            assert d.scaling == want.scaling
            assert torch.isfinite(d.B).all()
            assert torch.isfinite(d.A).all()
        assert (update.client, update.round, update.base) == ("c1", 1, "base")
        assert 1 <= update.num_examples <= 20
        assert update.metrics["update_norm"] <= 1e3
    assert taken < MUTATIONS


def mutate(data: bytes, rng: random.Random, header: int) -> bytes:
    """One to four edits: bits, bytes, cuts, repeats; half of them in the header."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        end = header if rng.random() < 0.5 else len(made)
        at = rng.randrange(max(1, min(end, len(made) or 1)))
        kind = rng.randrange(6)
        if kind == 0 and made:
            made[at % len(made)] ^= 1 << rng.randrange(8)
        elif kind == 1 and made:
            made[at % len(made)] = rng.randrange(256)
        elif kind == 2:
            del made[at : at + rng.randint(1, 64)]
        elif kind == 3:
            made[at:at] = rng.randbytes(rng.randint(1, 16))
        elif kind == 4:
            made[at:at] = made[at : at + rng.randint(1, 64)]
        else:
            made[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"1e99", b"null"])
    return bytes(made)
