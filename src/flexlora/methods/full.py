"""Federated full fine-tuning of the target modules: what low rank gives up.

McMahan et al.: Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS
2017, arXiv 1602.05629, on the same weight matrices that the adapters target.

    patch = sum_k p_k (W_k - W0)

Sparse fine-tuning at density 1. Embeddings, norms and biases stay frozen, so that the only
difference from the other methods is the rank. For small models: whole matrices are sent.
"""

from __future__ import annotations

from flexlora.adapter import Adapter
from flexlora.federation.state import Client, Method, Payload, ServerState, Updates
from flexlora.methods.slora import mean_sparse, send_sparse


def full() -> Method:
    """FedAvg on whole matrices.

    >>> full().up
    'd_out d_in'
    """
    return Method(
        name="full",
        downlink=downlink,
        aggregate=aggregate,
        view=view,
        mixed_ranks=True,
        exact=True,
        linear=True,
        averages="patch",
        trains="the whole weight of each target module",
        up="d_out d_in",
        down="d_out d_in",
        citation="McMahan et al.: Communication-Efficient Learning of Deep Networks from "
        "Decentralized Data, AISTATS 2017, arXiv 1602.05629",
    )


def downlink(state: ServerState, client: Client) -> Payload:
    """Every entry of every target, whatever rank the client has."""
    return send_sparse(state, client, density=1.0)


def aggregate(state: ServerState, updates: Updates) -> ServerState:
    """The mean change, dense."""
    return mean_sparse(state, updates, density=1.0)


def view(state: ServerState, client: Client | None) -> Adapter:
    """The initial adapter, which changes nothing; the change is in the patch."""
    return state.G
