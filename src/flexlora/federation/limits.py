"""How far one update may move the model: bounds that only earlier rounds can shift."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.federation.state import ServerState

NORMS = "admission.norms"
"""Key of `ServerState.aux`: the change norms admitted in earlier rounds, float64."""


@dataclass(frozen=True)
class Limits:
    """How far one update may move the model.

    The norm is that of the change, :func:`~flexlora.federation.admission.change_norm`.

    Attributes:
        first_norm: bound while no earlier round has admitted anything. Far above honest training:
            it is there for updates that blew up or mean harm.
        norm_multiple: of the median norm admitted in earlier rounds, from then on. Honest norms
            spread by about `sqrt(rank)` and with the number of local steps, so 20 leaves room for
            ranks 4 to 64 and a tenfold spread of data sizes.
        window: how many of the latest norms the median is taken over.
        lower_rank: whether a client may answer at a lower rank than it was sent, if it declares so
            (`Update.reduced`).
    """

    first_norm: float = 1e3
    norm_multiple: float = 20.0
    window: int = 1024
    lower_rank: bool = False

    def __post_init__(self) -> None:
        if not (self.first_norm > 0 and self.norm_multiple >= 1 and self.window >= 1):
            raise ValueError(
                f"{self}; expected first_norm > 0, norm_multiple >= 1 and window >= 1."
            )


def norm_bound(state: ServerState, limits: Limits) -> float:
    """The largest change that the coming round admits: one number, fixed before anyone answers."""
    norms = state.aux.get(NORMS, torch.zeros(0))
    norms = norms[norms > 0]  # rounds without training say nothing about honest steps
    if len(norms) == 0:
        return limits.first_norm
    return limits.norm_multiple * float(norms.quantile(0.5))


def norm_history(state: ServerState, norms: Iterable[float], limits: Limits) -> Tensor:
    """The norms admitted so far with this round's behind them: the next value of `aux[NORMS]`.

    Pass them in a fixed order (by client id): they are part of the checkpoint.
    """
    earlier = state.aux.get(NORMS, torch.zeros(0, dtype=torch.float64))
    return torch.cat([earlier, torch.tensor(list(norms), dtype=torch.float64)])[-limits.window :]
