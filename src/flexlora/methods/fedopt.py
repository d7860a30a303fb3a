"""FedAvgM and FedAdam: the server takes its own optimiser step along the aggregated change.

Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification, 2019, arXiv 1909.06335 (FedAvgM); Reddi et al.: Adaptive Federated Optimization,
ICLR 2021, arXiv 2003.00295 (FedAdam, its algorithm 2).

    change = aggregate(G) - G
    FedAvgM:  v <- beta v + change              G <- G + lr v
    FedAdam:  m <- b1 m + (1 - b1) change       v <- b2 v + (1 - b2) change^2
              G <- G + lr m / (sqrt(v) + tau)   per coordinate of the factors

Momentum is a sum of changes, so it has a meaning for products: it is kept as one and works at any
ranks. Adam's moments belong to coordinates, which an SVD replaces every round: refused there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flexlora.federation.state import Method, ServerState, Updates
from flexlora.lowrank import LowRank, svd_sum
from flexlora.methods.downlink import draw_seed
from flexlora.methods.fedavg import fedavg
from flexlora.methods.flexlora import flexlora

Moments = dict[str, Tensor]
Step = Callable[[str, Tensor, Tensor, Moments], Tensor]
"""`(key, old, change, aux to be written) -> new`, for one factor."""


def fedavgm(of: Method | None = None, lr: float = 1.0, momentum: float = 0.9) -> Method:
    """Server momentum on another method.

    Args:
        of: the wrapped method; FlexLoRA by default.
        lr: the server's learning rate.
        momentum: beta, in [0, 1).

    Raises:
        ValueError: a setting out of range, or a method whose step is not in `G`.
    """
    inner = flexlora() if of is None else of
    _check("fedavgm", inner, ("products", "factors"), lr)
    if not 0 <= momentum < 1:
        raise ValueError(f"fedavgm: momentum is {momentum}; expected 0 <= momentum < 1.")

    def step(key: str, old: Tensor, change: Tensor, aux: Moments) -> Tensor:
        v = momentum * aux.get(key, torch.zeros_like(change)) + change
        aux[key] = v
        return old + lr * v

    def on_products(state: ServerState, updates: Updates) -> ServerState:
        after = inner.aggregate(state, updates)
        G, aux = {}, dict(after.aux)
        for module, g in state.G.items():
            terms, weights = [after.G[module], g], [1.0, -1.0]
            if f"v/{module}/B" in aux:
                terms.append(LowRank(aux[f"v/{module}/B"], aux[f"v/{module}/A"]))
                weights.append(momentum)
            seed = draw_seed(state, "fill", module)
            v = svd_sum(terms, weights, min(2 * g.rank, *g.shape), seed)
            aux |= {f"v/{module}/B": v.B, f"v/{module}/A": v.A}
            G[module] = svd_sum([g, v], [1.0, lr], g.rank, seed)
        return replace(after, G=G, aux=aux)

    on_factors = _stepping(inner, step)
    return replace(
        inner,
        name=f"fedavgm({inner.name})",
        aggregate=on_products if inner.averages == "products" else on_factors,
        exact=False,
        citation=f"Hsu et al., 2019, arXiv 1909.06335; on: {inner.citation}",
    )


def fedadam(
    of: Method | None = None,
    lr: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Method:
    """Server Adam on a method that averages factors.

    Args:
        of: the wrapped method; FedAvg-LoRA by default.
        lr: the server's learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        tau: adaptivity: the floor of the denominator.

    Raises:
        ValueError: a setting out of range, or a method whose basis changes.
    """
    inner = fedavg() if of is None else of
    _check("fedadam", inner, ("factors",), lr)
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and tau > 0):
        raise ValueError(
            f"fedadam: beta1 {beta1}, beta2 {beta2}, tau {tau}; expected 0 <= beta < 1, tau > 0."
        )

    def step(key: str, old: Tensor, change: Tensor, aux: Moments) -> Tensor:
        m = beta1 * aux.get(f"m/{key}", torch.zeros_like(change)) + (1 - beta1) * change
        v = beta2 * aux.get(f"v/{key}", torch.full_like(change, tau**2)) + (1 - beta2) * change**2
        aux |= {f"m/{key}": m, f"v/{key}": v}
        return old + lr * m / (v.sqrt() + tau)

    return replace(
        inner,
        name=f"fedadam({inner.name})",
        aggregate=_stepping(inner, step),
        exact=False,
        citation=f"Reddi et al.: Adaptive Federated Optimization, ICLR 2021, arXiv 2003.00295; on: "
        f"{inner.citation}",
    )


def _stepping(inner: Method, step: Step) -> Callable[[ServerState, Updates], ServerState]:
    """An aggregate that replaces each factor's change by a step; factors that rest, rest."""

    def aggregate(state: ServerState, updates: Updates) -> ServerState:
        after = inner.aggregate(state, updates)
        aux, G = dict(after.aux), {}
        for module, old in state.G.items():
            new, key = after.G[module], f"opt/{module}"
            B = old.B if torch.equal(new.B, old.B) else step(f"{key}/B", old.B, new.B - old.B, aux)
            A = old.A if torch.equal(new.A, old.A) else step(f"{key}/A", old.A, new.A - old.A, aux)
            G[module] = LowRank(B, A)
        return replace(after, G=G, aux=aux)

    return aggregate


def _check(name: str, inner: Method, allowed: tuple[str, ...], lr: float) -> None:
    if lr <= 0:
        raise ValueError(f"{name}: lr is {lr}; expected a number above 0.")
    if inner.averages not in allowed:
        reasons = {
            "products": "an SVD gives it a new basis every round, in which moments per coordinate "
            "mean nothing; fedavgm works on products",
            "patch": "its step goes into the patch, not into the adapter",
        }
        raise ValueError(f"{name} cannot wrap {inner.name!r}: {reasons[inner.averages]}.")
