"""What people read while a run goes on: lines, and on a terminal one live line below them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

QUIET_SECONDS = 20.0
"""Off a terminal, how often progress is worth a line of its own."""


class Console:
    """Lines on a stream; progress as a spinner on a terminal, as an occasional line elsewhere.

    Args:
        stream: usually stdout; stderr where a program reads stdout.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console as Rich

        self._rich = Rich(file=stream, highlight=False, soft_wrap=True)
        self._status = self._rich.status("") if self._rich.is_terminal else None
        self._started = self._spoke = time.monotonic()

    def say(self, text: str = "") -> None:
        """One line, or several."""
        self._rich.print(text, markup=False)
        self._spoke = time.monotonic()

    def progress(self, text: str) -> None:
        """What is going on now."""
        if self._status is not None:
            self._status.update(text)
            self._status.start()
        elif time.monotonic() - self._spoke > QUIET_SECONDS:
            self.say(f"  {time.monotonic() - self._started:5.0f} s  {text}")

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()

    def rest(self) -> None:
        """Take the live line away."""
        if self._status is not None:
            self._status.stop()


Clock = Callable[[], float]
"""Seconds that a run has taken, earlier sittings included."""


def stopwatch(already: float = 0.0) -> Clock:
    """Seconds since now, on top of what was spent before.

    >>> stopwatch(5.0)() >= 5.0
    True
    """
    began = time.monotonic() - already
    return lambda: time.monotonic() - began
