"""Threads: data prepared while the device works, and devices that work at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")
Check = Callable[[], None]


def ahead(loads: Sequence[Callable[[], T]], depth: int) -> Generator[T]:
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


@dataclass(frozen=True)
class _End:
    """The last that a thread says."""

    error: BaseException | None


class _Stopped(Exception):
    """Raised in a thread whose work nobody waits for any more."""


def at_once(works: Sequence[Callable[[Check], Iterator[T]]]) -> Iterator[T]:
    """What several iterators make, as it comes, each in a thread of its own.

    An error in one is raised here. Then, as when this is closed, the others stop at their next item
    or where they call the check they were given; no thread is left. Two items a thread may wait.

    >>> sorted(at_once([lambda check: iter([1, 2]), lambda check: iter([3])]))
    [1, 2, 3]
    """
    said: Queue[T | _End] = Queue(2 * len(works))
    stop = Event()

    def check() -> None:
        if stop.is_set():
            raise _Stopped

    def run(work: Callable[[Check], Iterator[T]]) -> None:
        error = None
        try:
            for item in work(check):
                said.put(item)
                check()
        except BaseException as caught:
            error = caught
        said.put(_End(error))

    threads = [Thread(target=run, args=(work,), daemon=True) for work in works]
    try:
        for thread in threads:
            thread.start()
        left = len(threads)
        while left:
            item = said.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                left -= 1
    finally:
        stop.set()
        for thread in threads:
            while thread.is_alive():
                with suppress(Empty):  # so that none waits for room
                    said.get(timeout=0.05)
