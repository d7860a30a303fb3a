"""The local loss term of a payload, added to a slot's gradient once per optimiser step."""

from __future__ import annotations

import torch

from flexlora.federation.state import Payload
from flexlora.training.penalties import value
from flexlora.training.slot import Slot
from flexlora.training.terms import Lora


def add_penalty_(slot: Slot, payload: Payload) -> None:
    """Add the gradient of the penalty at the slot's factors; the distance is to the payload's.

    It stands beside the mean loss over labels, not within it: reported losses are of the data.
    """
    if payload.penalty is None:
        return
    for module, d in slot.adapter.items():
        term, sent = slot.terms[module], payload.adapter[module].to(d.B.dtype, d.B.device)
        if not isinstance(term, Lora):
            continue
        B, A = (x.detach()[None].requires_grad_() for x in (d.B, d.A))
        scaling = torch.tensor([d.scaling], dtype=B.dtype, device=B.device)
        ranks = torch.tensor([d.rank], device=B.device)
        before = sent.B[None], sent.A[None]
        with torch.enable_grad():
            loss = value(payload.penalty, (B, A), before, scaling, ranks).sum()
        dB, dA = torch.autograd.grad(loss, (B, A))
        for buffer, gradient in ((term.dB, dB), (term.dA, dA)):
            if buffer is not None:
                buffer.add_(gradient[0])
