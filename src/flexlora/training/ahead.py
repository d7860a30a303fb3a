"""Data prepared while the device works."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(loads: Sequence[Callable[[], T]], depth: int) -> Iterator[T]:
    """Results in order, with up to `depth` of the next ones being made in a background thread.

    Depth 0 makes each when it is asked for. An error is raised where its result would have stood.

    >>> list(ahead([lambda: 1, lambda: 2, lambda: 3], depth=2))
    [1, 2, 3]
    """
    if not depth:
        for load in loads:
            yield load()
        return
    with ThreadPoolExecutor(1) as pool:
        making = deque(pool.submit(load) for load in loads[:depth])
        rest = iter(loads[depth:])
        while making:
            done = making.popleft()
            making.extend(pool.submit(load) for load in [next(rest, None)] if load)
            yield done.result()
