"""What a user is told when something cannot go on: one message, one documented exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

USAGE, DATA, MODEL, RUN, INTERRUPTED = 2, 3, 4, 5, 130
"""Exit codes: command line or configuration; data; base model or adapter; run directory or disk."""


class Failure(Exception):
    """An error that its message explains; the command line prints it without a traceback.

    Attributes:
        code: the process's exit code.
    """

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code


INPUT = (ValueError, LookupError, TypeError, OSError, ImportError)
"""What rooms raise about their input."""


@contextmanager
def blame(code: int, where: str, kinds: tuple[type[Exception], ...] = INPUT) -> Iterator[None]:
    """Errors that the rooms raise about their input become a :class:`Failure` with this exit code.

    A message that already begins with the place, or with its last part, does not get it twice.

    >>> with blame(DATA, "data"):
    ...     raise ValueError("no examples")
    Traceback (most recent call last):
    flexlora.experiment.errors.Failure: data: no examples
    """
    try:
        yield
    except kinds as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        text = text.removeprefix(f"{where.rpartition('.')[2]}: ") or type(error).__name__
        raise Failure(text if text.startswith(where) else f"{where}: {text}", code) from error


EXTRAS = {
    "reasoning_gym": "demo", "gguf": "demo", "matplotlib": "plots", "datasets": "hub",
    "flwr": "flower", "grpc": "flower", "bitsandbytes": "quantized",
    "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio",
}  # fmt: skip
"""Optional package -> the extra that brings it."""


def missing(module: str) -> str:
    """What to do about a package that is not installed.

    >>> missing("flwr.server"), missing("numpy")
    ('Install it: pip install "flexlora[flower]".', 'Install it: pip install flexlora.')
    """
    extra = EXTRAS.get(module.partition(".")[0])
    what = f'"flexlora[{extra}]"' if extra else "flexlora"
    return f"Install it: pip install {what}."


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the end of a message about an unknown name.

    >>> nearest("learnin_rate", ["learning_rate", "max_steps"])
    "did you mean 'learning_rate'?"
    >>> nearest("zzz", ["b", "a"])
    'known: a, b.'
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}."
