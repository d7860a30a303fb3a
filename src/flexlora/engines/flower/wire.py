"""Payloads as bytes: what a server sends, self-contained, in the safetensors format.

Numbers travel as raw `float32`, `bfloat16` or `float16` under a JSON header, never pickled. A node
reads what the server it has authenticated sends; the way back is in :mod:`.answers`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from flexlora.adapter import initial_adapter
from flexlora.federation.state import Payload, Penalty, Term, Wire
from flexlora.lowrank import LowRank, Mask

VERSION = 1
"""Of this format; a node and a server of unequal versions do not start."""


def digest(data: bytes) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(data).hexdigest()


def encode_payload(payload: Payload, wire: Wire, run: str = "") -> bytes:
    """A payload with everything a fresh process needs; factors that it can draw are left out.

    Lossless if the numbers are already rounded to `wire`, as methods round them.

    Args:
        payload: what one client is sent.
        wire: precision of the numbers.
        run: identifies the run, so that no two runs send the same bytes.
    """
    dtype, tensors = getattr(torch, wire), dict[str, Tensor]()
    drawn = _drawn(payload) if payload.known else {}
    left_out = {
        f"{m}/{f}"
        for m in drawn
        for f in payload.known
        if torch.equal(getattr(drawn[m], f), getattr(payload.adapter[m], f))
    }
    for module, d in payload.adapter.items():
        tensors |= {f"adapter/{module}/B": d.B, f"adapter/{module}/A": d.A}
    frozen: dict[str, list[float | None]] = {}  # None: a dense term
    for module, terms in payload.frozen.items():
        frozen[module] = [t.scaling if isinstance(t, LowRank) else None for t in terms]
        for i, term in enumerate(terms):
            tensors |= _flat(f"frozen/{module}/{i}", term)
    rest = {
        **{name: getattr(payload, name) for name in PLAIN},
        "version": VERSION,
        "run": run,
        "adapter": {m: [*d.shape, d.rank, d.scaling] for m, d in payload.adapter.items()},
        "drawn": sorted(left_out),
        "frozen": frozen,
        "mask": {m: [*mask.shape, mask.count, mask.seed] for m, mask in payload.mask.items()},
        "penalty": vars(payload.penalty) if payload.penalty else None,
    }
    kept = {k: t for k, t in tensors.items() if k.removeprefix("adapter/") not in left_out}
    return frame(kept, rest, dtype)


PLAIN = ("client", "round", "base", "train", "keep", "known", "seed")


def decode_payload(data: bytes) -> Payload:
    """Inverse of :func:`encode_payload`, in float32.

    Raises:
        ValueError: another version of the format.
    """
    size = int.from_bytes(data[:8], "little")
    rest = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["flexlora"])
    if rest["version"] != VERSION:
        raise ValueError(f"wire: version {rest['version']}; this flexlora speaks {VERSION}.")
    # Copies in torch's own memory: matrix products round differently at other alignments.
    tensors = {k: t.to(torch.float32, copy=True) for k, t in load(data).items()}
    shapes = {m: (row[0], row[1]) for m, row in rest["adapter"].items()}
    ranks = {m: row[2] for m, row in rest["adapter"].items()}
    drawn = initial_adapter(shapes, ranks, rest["seed"]) if rest["drawn"] else {}
    adapter = {}
    for module, (*_, scaling) in rest["adapter"].items():
        B, A = (
            getattr(drawn[module], f)
            if f"{module}/{f}" in rest["drawn"]
            else tensors[f"adapter/{module}/{f}"]
            for f in "BA"
        )
        adapter[module] = LowRank(B, A, scaling)
    frozen = {
        module: tuple(_term(tensors, f"frozen/{module}/{i}", s) for i, s in enumerate(scalings))
        for module, scalings in rest["frozen"].items()
    }
    mask = {m: Mask((row[0], row[1]), *row[2:]) for m, row in rest["mask"].items()}
    penalty = Penalty(**rest["penalty"]) if rest["penalty"] else None
    plain = {name: rest[name] for name in PLAIN}
    return Payload(**plain, adapter=adapter, frozen=frozen, mask=mask, penalty=penalty)


def _drawn(payload: Payload) -> dict[str, LowRank]:
    shapes = {m: d.shape for m, d in payload.adapter.items()}
    return initial_adapter(shapes, {m: d.rank for m, d in payload.adapter.items()}, payload.seed)


def _flat(name: str, term: Term) -> dict[str, Tensor]:
    if isinstance(term, Tensor):
        return {name: term}
    return {f"{name}/B": term.B, f"{name}/A": term.A}


def _term(tensors: Mapping[str, Tensor], name: str, scaling: float | None) -> Term:
    if scaling is None:
        return tensors[name]
    return LowRank(tensors[f"{name}/B"], tensors[f"{name}/A"], scaling)


def frame(tensors: Mapping[str, Tensor], rest: Mapping[str, Any], dtype: torch.dtype) -> bytes:
    """A safetensors file of one number type, with everything else as JSON in its metadata."""
    # Own memory: views of one factorisation share theirs, which the format refuses.
    own = {k: t.detach().cpu().to(dtype, copy=True).contiguous() for k, t in tensors.items()}
    return save(own, metadata={"flexlora": json.dumps(rest)})
