"""The boundary: what a client sends is checked once here, and one bad update never kills a round.

Everything behind this file is unguarded. A refusal names what was expected and what came in numbers
and in the server's own words; it never quotes strings that a client chose.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

from flexlora.adapter import Adapter
from flexlora.federation.state import Payload, Update
from flexlora.lowrank import LowRank

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Reason(StrEnum):
    """Why an update is not part of its round."""

    UNKNOWN_CLIENT = "unknown client"
    DUPLICATE = "duplicate"
    ROUND = "other round"
    BASE = "other base model"
    MODULES = "modules"
    SHAPE = "shape"
    RANK = "rank"
    DTYPE = "dtype"
    SCALING = "scaling"
    FROZEN = "changed a factor it does not train"
    NOT_FINITE = "not finite"
    EXAMPLES = "number of examples"
    NORM = "norm"
    MALFORMED = "malformed"
    # What an engine reports of clients that sent nothing to check.
    LATE = "late"
    FAILED = "failed"
    MEMORY = "out of memory"
    OFFLINE = "offline"


@dataclass(frozen=True)
class Refusal:
    """One update that was not admitted, as records keep it and as engines may report it."""

    client: str
    reason: Reason
    message: str


class Refused(ValueError):
    """An update that was not admitted; `reason` for programs, the message for people."""

    def __init__(self, reason: Reason, message: str, client: str = "") -> None:
        super().__init__(message)
        self.refusal = Refusal(client, reason, message)

    @property
    def reason(self) -> Reason:
        """One of the enumerated reasons."""
        return self.refusal.reason


def admit(
    update: Update,
    sent: Payload,
    enrolled: int,
    bound: float = math.inf,
    seen: Collection[str] = (),
    lower_rank: bool = False,
) -> Update:
    """The update as the server takes it, or a refusal; pure.

    What comes back holds the payload's modules in the payload's order with the payload's scalings,
    detached factors in the dtype they came in, and of the metrics only finite numbers under plain
    names, with `update_norm` (the norm of the change) computed here.

    Cost: one pass over the factors and their Gram matrices.

    Args:
        update: what came from outside; nothing about it is trusted.
        sent: what this client was sent this round.
        enrolled: training examples the client registered with; it may claim fewer, not more.
        bound: of the norm of the change, from :func:`~flexlora.federation.limits.norm_bound`.
        seen: clients already admitted this round.
        lower_rank: see :class:`~flexlora.federation.limits.Limits`.

    Raises:
        Refused: the first thing that is wrong.
    """
    try:
        _envelope(update, sent, enrolled, seen)
        lower = lower_rank and update.reduced is True
        adapter = {m: _module(m, update.adapter[m], sent, lower) for m in sent.adapter}
        moved = change_norm(adapter, sent.adapter)
        if not (math.isfinite(moved) and moved <= bound):
            raise Refused(
                Reason.NORM,
                f"the change has norm {moved:.3g}; this round admits up to {bound:.3g}. Lower the "
                "client's learning rate or steps, or raise the limits if this is honest.",
            )
    except Refused as refused:
        r = refused.refusal
        message = f"round {sent.round}, client {sent.client!r}: {r.message}"
        raise Refused(r.reason, message, sent.client) from None
    metrics = {**_plain(update.metrics), "update_norm": moved}
    return replace(update, adapter=adapter, metrics=metrics)


def _envelope(update: Update, sent: Payload, enrolled: int, seen: Collection[str]) -> None:
    """Everything but the tensors. Types are compared exactly: `True == 1`, and strings subclass."""
    if not isinstance(update, Update):
        raise Refused(Reason.MALFORMED, f"got {type(update).__name__}; expected an Update.")
    if update.client != sent.client:
        raise Refused(Reason.UNKNOWN_CLIENT, "the update bears another client's id.")
    if sent.client in seen:
        raise Refused(Reason.DUPLICATE, "an update of this client is already in this round.")
    if type(update.round) is not int or update.round != sent.round:
        raise Refused(Reason.ROUND, f"trained for another round; expected {sent.round}.")
    if update.base != sent.base:
        raise Refused(Reason.BASE, f"trained on another base model; expected {sent.base!r}.")
    if type(update.num_examples) is not int or not 1 <= update.num_examples <= enrolled:
        raise Refused(
            Reason.EXAMPLES,
            f"claims {_number(update.num_examples)} examples; expected 1 to the {enrolled} it "
            "enrolled with. A client cannot buy weight; enrol again if its data has grown.",
        )
    adapter = update.adapter
    if not isinstance(adapter, Mapping):
        raise Refused(Reason.MALFORMED, "the adapter is not a mapping from module to product.")
    if adapter.keys() != sent.adapter.keys():
        missing = [m for m in sent.adapter if m not in adapter]
        extra = len(adapter.keys() - sent.adapter.keys())
        raise Refused(
            Reason.MODULES,
            f"{len(missing)} modules missing {missing[:3]}, {extra} unexpected; expected the "
            f"{len(sent.adapter)} that were sent.",
        )


def _module(module: str, d: LowRank, sent: Payload, lower: bool) -> LowRank:
    """One product, checked and detached, with the scaling that was sent."""
    want = sent.adapter[module]
    B, A = _factors(module, d, want, lower)
    if type(d.scaling) not in (int, float) or d.scaling != want.scaling:
        raise Refused(
            Reason.SCALING,
            f"module {module!r}: {_number(d.scaling)}; expected {want.scaling:g} as sent.",
        )
    want = want.prefix(A.shape[0])
    for name, got, was in (("B", B, want.B), ("A", A, want.A)):
        trained = name in sent.train and name not in sent.keep
        if not trained and not torch.equal(got.to(was), was):
            raise Refused(Reason.FROZEN, f"module {module!r}: {name} differs from what was sent.")
        if not _finite(got):
            raise Refused(Reason.NOT_FINITE, f"module {module!r}: {name} holds NaN or infinity.")
    return LowRank(B, A, want.scaling)


def _factors(module: str, d: LowRank, want: LowRank, lower: bool) -> tuple[Tensor, Tensor]:
    """Both factors, of a dtype, shape and rank that fit what was sent."""
    at = f"module {module!r}"
    if not (isinstance(d, LowRank) and isinstance(d.B, Tensor) and isinstance(d.A, Tensor)):
        raise Refused(Reason.MALFORMED, f"{at}: not a pair of tensors.")
    B, A = d.B.detach(), d.A.detach()
    dense = B.layout == A.layout == torch.strided and not (B.is_meta or A.is_meta)
    if B.dtype not in FLOATS or A.dtype != B.dtype or not dense:
        raise Refused(Reason.DTYPE, f"{at}: {B.dtype}, {A.dtype}; expected one dense float dtype.")
    if B.ndim != 2 or A.ndim != 2 or (B.shape[0], A.shape[1]) != want.shape:
        raise Refused(
            Reason.SHAPE,
            f"{at}: B {tuple(B.shape)}, A {tuple(A.shape)}; expected B {tuple(want.B.shape)}, "
            f"A {tuple(want.A.shape)}.",
        )
    rank = A.shape[0]
    if B.shape[1] != rank or not (rank == want.rank or (lower and 1 <= rank < want.rank)):
        raise Refused(
            Reason.RANK,
            f"{at}: ranks {B.shape[1]} (B) and {rank} (A); expected {want.rank} as assigned, "
            + ("or lower." if lower else "and a lower one only if declared and allowed."),
        )
    return B, A


def _finite(x: Tensor) -> bool:
    """Whether all numbers are finite: extremes carry NaN and infinity, at a third of the cost."""
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def change_norm(adapter: Adapter, sent: Adapter) -> float:
    """How far training moved an adapter: the largest of three Frobenius norms over all modules.

    That of the product, `||D - D0|| = s ||dB A + B0 dA||` with `dB = B - B0`, `dA = A - A0`, and
    those of its factors, `s ||dB||` and `||dA||`: methods that average factors or keep B at the
    client would not see a huge A beside a B of zero in the product. Subtracting the factors first
    loses no digits where subtracting norms would. A product of lower rank is compared with that
    prefix of what was sent. Infinite where float32 overflows.

    >>> import torch
    >>> sent = {"q": LowRank(torch.ones(2, 1), torch.ones(1, 2), 2.0)}
    >>> change_norm({"q": LowRank(torch.ones(2, 1), 3 * torch.ones(1, 2), 2.0)}, sent)
    8.0
    """
    totals = sum(_change_squares(d, sent[m]) for m, d in adapter.items())
    if not isinstance(totals, Tensor):
        return 0.0
    largest = float(totals.max())  # NaN (infinity less infinity) passes through max of a tensor
    return math.inf if math.isnan(largest) else math.sqrt(max(largest, 0.0))


def _change_squares(d: LowRank, sent: LowRank) -> Float[Tensor, " 3"]:
    dtype = torch.promote_types(d.B.dtype, torch.float32)
    d, sent = d.to(dtype), sent.prefix(d.rank).to(dtype, d.B.device)
    dB, dA = d.B - sent.B, d.A - sent.A
    gram_B, gram_A = dB.T @ dB, dA @ dA.T
    product = (gram_B * (d.A @ d.A.T)).sum()
    if sent.B.any():
        product = product + ((sent.B.T @ sent.B) * gram_A).sum()
        product = product + 2 * ((dB.T @ sent.B) * (d.A @ dA.T)).sum()
    s2 = d.scaling**2
    return torch.stack([s2 * product, s2 * gram_B.trace(), gram_A.trace()]).double()


def _plain(metrics: object) -> dict[str, float]:
    """At most 64 finite numbers under plain names: what a client says about itself."""
    if not isinstance(metrics, Mapping):
        return {}
    named = ((k, v) for k, v in list(metrics.items())[:64] if type(k) is str)
    return {
        k: float(v)
        for k, v in named
        if re.fullmatch(r"[a-z0-9_./]{1,48}", k) and type(v) in (int, float) and abs(v) < 1e300
    }


def _number(value: object) -> str:
    if not isinstance(value, int | float):
        return type(value).__name__
    return f"{value:g}" if abs(value) < 1e15 else "a number beyond 1e15"
