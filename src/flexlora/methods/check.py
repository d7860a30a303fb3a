"""Refusals that need both a method and a federation, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flexlora.federation.state import Client, Method


def check(
    method: Method, clients: Sequence[Client], modules: Iterable[str], cross_device: bool
) -> None:
    """Raise where a method cannot serve a federation.

    Args:
        method: the method.
        clients: all registered clients.
        modules: the target modules' paths.
        cross_device: whether clients are stateless: a small share each round, seen rarely.

    Raises:
        ValueError: mixed ranks under a method that needs one rank, or a method whose clients keep
            state among clients that do not.
    """
    if cross_device and not method.stateless:
        raise ValueError(
            f"method {method.name!r} keeps {method.trains.split(';')[-1].strip()} from round to "
            "round; cross-device clients keep nothing. Use the cross-silo setting, or a stateless "
            "method."
        )
    if method.mixed_ranks:
        return
    for module in modules:
        ranks = sorted({client.lora.rank(module) for client in clients})
        if len(ranks) > 1:
            raise ValueError(
                f"method {method.name!r} needs one rank for all clients, and module {module!r} has "
                f"ranks {ranks}. Use the homogeneous distribution, or a method for mixed ranks."
            )
