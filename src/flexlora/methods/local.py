"""Local only: every client trains its own adapter and nothing is exchanged.

The lower bound every federated comparison should show: what a client reaches without the others.
"""

from __future__ import annotations

from dataclasses import replace

from flexlora.federation.state import Client, Method, Payload, ServerState, Updates
from flexlora.methods.downlink import advance, pack, restarted, view_of


def local() -> Method:
    """No federation; both factors stay at the client.

    >>> local().stateless, local().averages
    (False, 'nothing')
    """
    return Method(
        name="local",
        downlink=downlink,
        aggregate=aggregate,
        view=view_of(downlink),
        mixed_ranks=True,
        linear=True,
        averages="nothing",
        stateless=False,
        trains="A, B; both stay at the client",
        up="0",
        down="0",
        citation="none: the bound without federation",
        start=restarted,
    )


def downlink(state: ServerState, client: Client) -> Payload:
    """The initial factors, which a client replaces by its own from the second time on."""
    return replace(pack(state, client), keep="AB", known="AB")


def aggregate(state: ServerState, updates: Updates) -> ServerState:
    """Nothing is aggregated; the round is counted."""
    return advance(state, state.G)
