"""Updates as bytes: the part of the boundary that lies before any tensor exists.

Updates come from anyone who holds a node key. :func:`decode_update` reads a safetensors file whose
layout it knows beforehand and allocates nothing before it has compared the header with what was
asked for. Which numbers are in it is not its business: :func:`~flexlora.federation.admission.admit`
checks them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexlora.engines.flower.wire import frame
from flexlora.federation.admission import Reason, Refusal, Refused
from flexlora.federation.round import Engine
from flexlora.federation.state import Client, Payload, Update, Wire
from flexlora.lowrank import LowRank

TAGS: Mapping[Wire, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
HEADER_BYTES = 32 << 10
"""Room in an update's header for what is no tensor; 64 metrics need a quarter of it."""


def encode_update(update: Update, sent: Payload, answers: str, wire: Wire) -> bytes:
    """An update as it travels: only the factors that were trained and are not kept.

    Args:
        update: to be sent.
        sent: the payload it answers.
        answers: digest of that payload's bytes.
        wire: precision of the numbers.
    """
    tensors = {
        f"{module}/{f}": getattr(d, f) for module, d in update.adapter.items() for f in _up(sent)
    }
    rest = {
        "answers": answers,
        "client": update.client,
        "round": update.round,
        "base": update.base,
        "num_examples": update.num_examples,
        "reduced": update.reduced,
        "metrics": dict(update.metrics),
    }
    return frame(tensors, rest, getattr(torch, wire))


def largest(sent: Payload, wire: Wire) -> tuple[int, int]:
    """The most bytes that an answer to a payload may have: of its header, and of all of it."""
    size = getattr(torch, wire).itemsize
    factors = [getattr(d, f) for d in sent.adapter.values() for f in _up(sent)]
    names = sum(len(json.dumps(f"{m}/{f}")) for m in sent.adapter for f in _up(sent))
    header = HEADER_BYTES + names + 160 * len(factors)
    return header, 8 + header + size * sum(x.numel() for x in factors)


def decode_update(data: bytes, sent: Payload, answers: str, wire: Wire) -> Update:
    """An update from bytes that anyone may have made.

    Sizes are compared with what was sent before anything is decoded, every tensor's name, type,
    shape and place before it is read. What comes back is float32; factors that do not travel are
    those that were sent. Cost: one copy of the tensors.

    Args:
        data: what came.
        sent: the payload it should answer.
        answers: digest of that payload's bytes, which differ between runs, rounds and clients.
        wire: precision agreed on.

    Raises:
        Refused: the first thing that is wrong, for `admit`'s reasons.
    """
    header_cap, cap = largest(sent, wire)
    if not isinstance(data, bytes) or not 8 <= len(data) <= cap:
        raise _refused(sent, Reason.MALFORMED, f"{len(data)} bytes; expected 8 to {cap}.")
    size = int.from_bytes(data[:8], "little")
    if not 2 <= size <= min(header_cap, len(data) - 8):
        raise _refused(
            sent, Reason.MALFORMED, f"a header longer than {header_cap} or than the data."
        )
    header = _object(data[8 : 8 + size], sent)
    about = header.pop("__metadata__", None)
    text = about.get("flexlora") if isinstance(about, dict) else None
    rest = _object(text.encode("utf-8", "replace") if isinstance(text, str) else b"", sent)
    if rest.get("answers") != answers:
        raise _refused(sent, Reason.ROUND, "it answers another payload: of another round or run.")
    if rest.get("client") != sent.client:
        raise _refused(sent, Reason.UNKNOWN_CLIENT, "the update bears another client's id.")
    body = bytearray(memoryview(data)[8 + size :])
    tensors = dict(_tensors(header, body, sent, wire))
    adapter = {}
    for module, was in sent.adapter.items():
        found = {f: tensors.get(f"{module}/{f}") for f in "BA"}
        rank = next((_rank(f, x) for f, x in found.items() if x is not None), was.rank)
        head = was.prefix(rank)
        B, A = (getattr(head, f) if x is None else x for f, x in found.items())
        adapter[module] = LowRank(B, A, was.scaling)
    known = ("client", "round", "base", "num_examples", "metrics", "reduced")
    fields: dict[str, Any] = {name: rest.get(name) for name in known}
    if not isinstance(fields["metrics"], dict):
        raise _refused(sent, Reason.MALFORMED, "metrics are not an object.")
    return Update(**fields, adapter=adapter)


def _tensors(
    header: Mapping[str, Any], body: bytearray, sent: Payload, wire: Wire
) -> Iterator[tuple[str, Tensor]]:
    """Every expected tensor, if all are there, of the right kind, and fill the body exactly."""
    expected = {f"{m}/{f}": getattr(d, f) for m, d in sent.adapter.items() for f in _up(sent)}
    if header.keys() != expected.keys():
        message = f"{len(header)} tensors; expected the {len(expected)} that were asked for."
        raise _refused(sent, Reason.MODULES, message)
    dtype, taken = getattr(torch, wire), 0
    for name, entry in sorted(header.items(), key=_place):
        was, at = expected[name], f"tensor {name!r}"
        if not isinstance(entry, dict) or entry.get("dtype") != TAGS[wire]:
            raise _refused(sent, Reason.DTYPE, f"{at}: expected {TAGS[wire]}.")
        shape, factor = entry.get("shape"), name[-1]
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)):
            raise _refused(sent, Reason.SHAPE, f"{at}: expected two dimensions.")
        rank, side = (shape[1], 0) if factor == "B" else (shape[0], 1)
        if shape[side] != was.shape[side]:
            raise _refused(sent, Reason.SHAPE, f"{at}: {shape}; expected {list(was.shape)}.")
        if not 1 <= rank <= _rank(factor, was):
            raise _refused(sent, Reason.RANK, f"{at}: rank {rank}, sent {_rank(factor, was)}.")
        end = taken + shape[0] * shape[1] * dtype.itemsize
        if entry.get("data_offsets") != [taken, end] or end > len(body):
            raise _refused(sent, Reason.MALFORMED, f"{at}: does not lie where its shape says.")
        flat = torch.frombuffer(body, dtype=dtype, count=shape[0] * shape[1], offset=taken)
        # A copy in torch's own memory: matrix products round differently at other alignments.
        yield name, flat.view(shape).to(torch.float32, copy=True)
        taken = end
    if taken != len(body):
        raise _refused(sent, Reason.MALFORMED, f"{len(body) - taken} bytes that no tensor claims.")


def _place(item: tuple[str, Any]) -> int:
    """Where an entry says that it starts, if it says so at all."""
    offsets = item[1].get("data_offsets") if isinstance(item[1], dict) else None
    first = offsets[0] if isinstance(offsets, list) and offsets else 0
    return first if type(first) is int else 0


def _object(data: bytes, sent: Payload) -> dict[str, Any]:
    """A JSON object in which no key stands twice."""
    try:
        found = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _refused(sent, Reason.MALFORMED, "the header is not one JSON object.")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refused(sent: Payload, reason: Reason, message: str) -> Refused:
    return Refused(reason, f"round {sent.round}, client {sent.client!r}: {message}", sent.client)


def _rank(factor: str, x: Tensor) -> int:
    return x.shape[1] if factor == "B" else x.shape[0]


def _up(sent: Payload) -> str:
    return "".join(f for f in sent.train if f not in sent.keep)


@dataclass(frozen=True, eq=False)
class Coded:
    """An engine whose updates are what a server decodes: what travels, at the wire's precision.

    Attributes:
        engine: that trains.
        wire: precision of the numbers.
    """

    engine: Engine
    wire: Wire

    def train(
        self, payloads: Sequence[Payload], clients: Mapping[str, Client]
    ) -> Iterator[Update | Refusal]:
        """The engine's answers, encoded and decoded."""
        sent = {p.client: p for p in payloads}
        for answer in self.engine.train(payloads, clients):
            if isinstance(answer, Refusal):
                yield answer
            else:
                payload = sent[answer.client]
                data = encode_update(answer, payload, "", self.wire)
                yield decode_update(data, payload, "", self.wire)
