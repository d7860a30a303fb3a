"""What a client's text is: a task with lazily read examples. The rest of this room makes these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "eval", "test"]


@dataclass(frozen=True)
class Example:
    """One instruction with its answer.

    Attributes:
        instruction: what is asked.
        input: the material it is asked about; may be empty.
        output: the reference answer.
        meta: what a task's own scorer needs (reasoning-gym's entry); empty otherwise.
    """

    instruction: str
    input: str
    output: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A client's data. Opening one costs about a kilobyte; text is read on demand.

    Attributes:
        id: the client's id.
        task: name of the task.
        category: group of tasks, for per-category results and unseen splits.
        sizes: examples per split.
        load: reads one split; the same list, in the same order, every time.
        score: the task's own scorer `(generated text, example) -> 0..1`, or None.
    """

    id: str
    task: str
    category: str
    sizes: Mapping[Split, int]
    load: Callable[[Split], Sequence[Example]]
    score: Callable[[str, Example], float] | None = None


Population = Mapping[str, Task]
"""Client id -> task."""
