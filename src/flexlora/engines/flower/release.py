"""Which Flower this works with."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

FIRST, BEYOND = (1, 41), (1, 43)
"""From the first to before the second, as in the extra `flower`: options, ports and names move
between minor versions."""


def insist_on_flower(installed: str | None = None) -> None:
    """Refuse another Flower in a sentence, before anything of it is imported.

    Args:
        installed: a version; by default the installed one.

    Raises:
        ImportError: none, or another.
    """
    wanted = f"flwr>={FIRST[0]}.{FIRST[1]},<{BEYOND[0]}.{BEYOND[1]}"
    try:
        found = installed or metadata.version("flwr")
    except metadata.PackageNotFoundError:
        raise ImportError(f'Flower is not installed; install it: pip install "{wanted}".') from None
    if not FIRST <= Version(found).release[:2] < BEYOND:
        raise ImportError(
            f"Flower {found} is installed; this flexlora works with {wanted}: "
            f'pip install "{wanted}", on the server and at every site.'
        )
