"""FedProx on the product: clients pay for leaving the update they were sent.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks, MLSys
2020, arXiv 1812.06127.

    local loss + mu / 2 ||D - D_0||_F^2        D = s B A,  D_0 what was sent

The distance is between products, not factors: it does not depend on the gauge, and it is zero
exactly when the model is unchanged. The server rule is that of the wrapped method.
"""

from __future__ import annotations

from dataclasses import replace

from flexlora.federation.state import Client, Method, Payload, Penalty, ServerState
from flexlora.methods.flexlora import flexlora


def fedprox(of: Method | None = None, mu: float = 0.01) -> Method:
    """Another method with a proximal term in its local loss.

    Args:
        of: the wrapped method; FlexLoRA by default.
        mu: strength, above 0.

    Raises:
        ValueError: `mu` not above 0, or (when a payload is made) a method that already has a local
            loss term or trains sparse values.
    """
    inner = flexlora() if of is None else of
    if mu <= 0:
        raise ValueError(f"fedprox: mu is {mu}; expected a number above 0.")

    def downlink(state: ServerState, client: Client) -> Payload:
        payload = inner.downlink(state, client)
        if payload.penalty is not None or payload.mask:
            reason = "has a local loss term of its own" if payload.penalty else "trains no factors"
            raise ValueError(f"fedprox cannot wrap {inner.name!r}: it {reason}.")
        return replace(payload, penalty=Penalty("prox", mu))

    return replace(
        inner,
        name=f"fedprox({inner.name})",
        downlink=downlink,
        citation=f"Li et al.: Federated Optimization in Heterogeneous Networks, MLSys 2020, "
        f"arXiv 1812.06127; on: {inner.citation}",
    )
