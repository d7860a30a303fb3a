"""What a round did to the model, measured from factors: spectra, retention, cosines, bytes.

Everything returned is plain JSON. Energies are squared singular values of the global adapter `G`;
the collapse curve is `beyond_smallest` over the rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.adapter import Adapter, LoraSpec
from flexlora.federation.ranks import label
from flexlora.federation.state import (
    Client,
    Payload,
    ServerState,
    Term,
    Updates,
    Wire,
    floats_down,
    floats_up,
    iterate,
)
from flexlora.lowrank import LowRank, difference, inner, norm, owned, stack


def levels(clients: Iterable[Client]) -> dict[str, LoraSpec]:
    """The distinct ranks of a federation, small to large: label -> what such a client trains.

    >>> small, large = (Client(c, LoraSpec(r), 1) for c, r in (("a", 4), ("b", 16)))
    >>> list(levels([large, small, large]))
    ['4', '16']
    """
    found: dict[str, LoraSpec] = {}
    for client in clients:
        found.setdefault(label(client.lora.r), client.lora)
    return dict(sorted(found.items(), key=lambda item: _mean_rank(item[1])))


def spectra(
    state: ServerState, at: Mapping[str, LoraSpec], per_module: bool = False
) -> dict[str, Any]:
    """The global adapter's energy: how much there is, and how much each client rank can hold.

    - `energy`: `sum S^2` over all modules,
    - `captured`: for each rank level the share of it that `trunc_r` keeps,
    - `beyond_smallest`: the share that the smallest level cannot hold,
    - `effective_rank`: mean over modules of `exp(entropy of S^2 / sum S^2)` (Roy and Vetterli,
      EUSIPCO 2007, who take S; with S^2 it speaks of energy).

    Shares are None while `G` is zero. Cost: per module two thin QRs and the singular values of an
    `(R, R)` core.

    Args:
        state: after the round.
        at: rank levels, small to large, from :func:`levels`.
        per_module: adds `modules`: the same numbers for each module.
    """
    energies = {m: singular_values(g).double() ** 2 for m, g in state.G.items()}
    if not energies:
        raise ValueError("spectra: the state has no modules; expected at least one in G.")
    rows = {m: _spectrum(m, e, at) for m, e in energies.items()}
    total = sum(r["energy"] for r in rows.values())
    captured = {
        name: sum(r["energy"] * (r["captured"][name] or 0.0) for r in rows.values()) / total
        if total
        else None
        for name in at
    }
    smallest = next(iter(captured.values()), None)
    out: dict[str, Any] = {
        "energy": total,
        "captured": captured,
        "beyond_smallest": None if smallest is None else max(0.0, 1 - smallest),
        "effective_rank": fmean(r["effective_rank"] for r in rows.values()),
    }
    return {**out, "modules": rows} if per_module else out


def _spectrum(
    module: str, energies: Float[Tensor, " rank"], at: Mapping[str, LoraSpec]
) -> dict[str, Any]:
    total = float(energies.sum())
    if total == 0:
        return {"energy": 0.0, "captured": dict.fromkeys(at), "effective_rank": 0.0}
    share = energies / total
    entropy = -float(torch.xlogy(share, share).sum())
    captured = {n: min(1.0, float(share[: spec.rank(module)].sum())) for n, spec in at.items()}
    return {"energy": total, "captured": captured, "effective_rank": math.exp(entropy)}


def singular_values(product: LowRank) -> Float[Tensor, " rank"]:
    """Singular values of a product, descending, from its factors.

    >>> import torch
    >>> singular_values(LowRank(2 * torch.eye(3)[:, :2], torch.eye(4)[:2], 0.5)).tolist()
    [1.0, 1.0]
    """
    dtype = torch.promote_types(product.B.dtype, torch.float32)
    Rb = torch.linalg.qr(product.B.to(dtype), mode="r").R
    Ra = torch.linalg.qr(product.A.to(dtype).T, mode="r").R
    S: Tensor = torch.linalg.svdvals(Rb @ Ra.T)
    return S * abs(product.scaling)


def retention(updates: Updates) -> dict[str, float]:
    """What a round without training would leave: rank -> `q_j` for the components up to that rank.

    `q_j = sum of p_k over clients with r_k >= j` is the factor by which one FlexLoRA round shrinks
    direction j; it changes only at the ranks that are held, so one number per rank says it all.
    Where ranks differ between modules: the mean over modules. 1.0 means nothing is lost.
    """
    shares, ranks = [], set[int]()
    for _, terms in iterate(updates):
        shares.append(owned(terms, updates.weights).tolist())
        ranks |= {d.rank for d in terms}
    return {str(r): fmean(q[r - 1] if r <= len(q) else 0.0 for q in shares) for r in sorted(ranks)}


def cosines(
    before: ServerState, after: ServerState, updates: Updates, sent: Mapping[str, Payload]
) -> dict[str, float | None]:
    """Cosine between what each client changed and what the server changed, over all modules.

    `<D_k - D_k_sent, W_after - W_before>` over their norms, `W = patch + G`: -1 to 1, None where
    either is zero. Truncation by the server counts as its change. Modules under a sparse mask are
    left out. Never dense, except against a patch that is dense already. Cost, per client:
    `4 r_k R (d_out + d_in)` for each module.
    """
    dots, squares = dict.fromkeys(updates.clients, 0.0), dict.fromkeys(updates.clients, 0.0)
    moved = 0.0
    for module in updates.modules:
        if any(module in sent[c].mask for c in updates.clients):
            continue
        step = _step(before, after, module)
        moved += norm(step) ** 2 if isinstance(step, LowRank) else float(step.double().norm()) ** 2
        for client, d in zip(updates.clients, updates.module(module), strict=True):
            change = changed(d, sent[client].adapter[module])
            dots[client] += _dot(change, step)
            squares[client] += inner(change, change)
    return {
        c: dots[c] / math.sqrt(squares[c] * moved) if squares[c] > 0 and moved > 0 else None
        for c in updates.clients
    }


def _step(before: ServerState, after: ServerState, module: str) -> Term:
    """`(patch + G)_after - (patch + G)_before` of one module."""
    new, old = after.G[module], before.G[module]
    alike = (new.rank, new.scaling) == (old.rank, old.scaling)
    step: Term = difference(new, old) if alike else stack([new, old], [1.0, -1.0])
    if after.patch.get(module) is not before.patch.get(module):
        for state, sign in ((after, 1.0), (before, -1.0)):
            if module in state.patch:
                step = _plus(step, state.patch[module], sign)
    return step


def _plus(step: Term, term: Term, sign: float) -> Term:
    if isinstance(step, LowRank) and isinstance(term, LowRank):
        return stack([step, term], [1.0, sign])
    left, right = (t.dense() if isinstance(t, LowRank) else t for t in (step, term))
    return left + sign * right


def _dot(change: LowRank, step: Term) -> float:
    if isinstance(step, LowRank):
        return inner(change, step)
    return change.scaling * float((change.B.double() * (step @ change.A.T).double()).sum())


def changed(d: LowRank, sent: LowRank) -> LowRank:
    """What training changed, `D - D_sent`, at rank `2 r` or less, in float32 at least.

    A product of lower rank is compared with that prefix of what was sent.

    >>> import torch
    >>> sent = LowRank(torch.ones(2, 1), torch.ones(1, 2), 0.5)
    >>> changed(LowRank(torch.ones(2, 1), 3 * torch.ones(1, 2), 0.5), sent).dense()[0, 0].item()
    1.0
    """
    dtype = torch.promote_types(d.B.dtype, torch.float32)
    d, sent = d.to(dtype), sent.prefix(d.rank).to(dtype, d.B.device)
    return difference(d, sent) if sent.B.any() else d


def upload_bytes(sent: Payload, adapter: Adapter, wire: Wire = "float32") -> int:
    """Bytes of the factors that travel back: trained, and not kept by the client.

    >>> adapter = {"q": LowRank(torch.zeros(3, 2), torch.zeros(2, 5))}
    >>> upload_bytes(Payload("a", 1, "base", adapter, train="B"), adapter, "bfloat16")
    12
    """
    return floats_up(replace(sent, adapter=adapter)) * _itemsize(wire)


def download_bytes(payload: Payload, wire: Wire = "float32") -> int:
    """Bytes of what travels to a client: factors it cannot make itself, and frozen terms."""
    return floats_down(payload) * _itemsize(wire)


def _itemsize(wire: Wire) -> int:
    dtype: torch.dtype = getattr(torch, wire)
    return dtype.itemsize


def _mean_rank(spec: LoraSpec) -> float:
    return spec.r if isinstance(spec.r, int) else fmean(spec.r.values())
