"""Where the time of a group of steps goes."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds per phase: a lap adds the time since the one before to its phase."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._began = self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End a phase; it may be entered again."""
        now = time.perf_counter()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._began
