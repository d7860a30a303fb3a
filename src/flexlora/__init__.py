"""Federated LoRA fine-tuning at the rank each client can afford.

The names below are the package for scripts; each is imported when it is first used, so that
`import flexlora` and `flexlora --help` take no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexlora.adapter import LoraSpec as LoraSpec
    from flexlora.adapter import load_peft as load_peft
    from flexlora.adapter import save_peft as save_peft
    from flexlora.data.load import load_population as load_population
    from flexlora.data.splits import hold_out as hold_out
    from flexlora.data.splits import leakage as leakage
    from flexlora.data.task import Example as Example
    from flexlora.data.task import Task as Task
    from flexlora.engines.embedded import Embedded as Embedded
    from flexlora.engines.embedded import Prompting as Prompting
    from flexlora.experiment.initial import initial_state as initial_state
    from flexlora.federation.ranks import assign as assign
    from flexlora.federation.run import Schedule as Schedule
    from flexlora.federation.run import run as run
    from flexlora.federation.spool import Spool as Spool
    from flexlora.federation.state import Client as Client
    from flexlora.federation.state import Method as Method
    from flexlora.federation.state import ServerState as ServerState
    from flexlora.lowrank import LowRank as LowRank
    from flexlora.methods import make as make
    from flexlora.training.client import LocalTraining as LocalTraining
    from flexlora.training.evaluate import summary as summary
    from flexlora.training.models import load_base as load_base

_PLACES = {
    "adapter": ("LoraSpec", "load_peft", "save_peft"),
    "data.load": ("load_population",),
    "data.splits": ("hold_out", "leakage"),
    "data.task": ("Example", "Task"),
    "engines.embedded": ("Embedded", "Prompting"),
    "experiment.initial": ("initial_state",),
    "federation.ranks": ("assign",),
    "federation.run": ("Schedule", "run"),
    "federation.spool": ("Spool",),
    "federation.state": ("Client", "Method", "ServerState"),
    "lowrank": ("LowRank",),
    "methods": ("make",),
    "training.client": ("LocalTraining",),
    "training.evaluate": ("summary",),
    "training.models": ("load_base",),
}
_HOME = {name: f"flexlora.{place}" for place, names in _PLACES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flexlora' has no attribute {name!r}; it has {__all__}.")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
