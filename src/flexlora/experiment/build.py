"""From a configuration to the values of a run: data, clients with their ranks, the method."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flexlora.adapter import LoraSpec, Shapes, select
from flexlora.data.load import load_population, plugin
from flexlora.data.settings import SettingError
from flexlora.data.splits import hold_out
from flexlora.data.task import Population, Task
from flexlora.experiment.config import Config
from flexlora.experiment.errors import DATA, USAGE, Failure, blame, nearest
from flexlora.federation.ranks import PAPER_TYPES, About, Ranks, assign
from flexlora.federation.run import Schedule, suits
from flexlora.federation.state import Client, Method
from flexlora.methods import make
from flexlora.methods import methods as known_methods
from flexlora.training.client import LocalTraining

BOUNDS = {
    "local-only": "every client by itself",
    "centralised": "one adapter on everybody's data",
}
"""Not methods: a federation lies between them."""


@dataclass(frozen=True)
class Experiment:
    """What a configuration means, before any weight is loaded.

    Attributes:
        config: as written.
        population: every client's data.
        seen: ids of clients that may be sampled, sorted.
        unseen: ids of those kept out.
        method: the server's rule; for a bound, how its one participant is handed its adapter.
        clients: the seen ones with their ranks.
        schedule: rounds, and who is invited.
        training: settings of the local loop.
        shapes: module path -> `(d_out, d_in)` of the targets.
        notes: what the user should know about how the configuration was read.
    """

    config: Config
    population: Population
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    method: Method
    clients: Mapping[str, Client]
    schedule: Schedule
    training: LocalTraining
    shapes: Shapes
    notes: tuple[str, ...] = ()


def build(config: Config, shapes: Shapes, like: Experiment | None = None) -> Experiment:
    """Check a configuration against its data and the model's layers.

    Args:
        config: the configuration.
        shapes: of every linear layer of the base model.
        like: an experiment whose data and split are used again where the configuration's are the
            same; large tables take a minute to split.

    Raises:
        Failure: with the code of what is wrong: 2 configuration, 3 data, 4 model.
    """
    with blame(USAGE, "method"):
        method = build_method(config)
    if like is not None and like.config.data == config.data:
        population, seen, unseen = like.population, like.seen, like.unseen
    else:
        population, seen, unseen = build_population(config)
    with blame(USAGE, "lora.target_modules"):
        targets = select(shapes, config.lora.target_modules)
    shapes = {m: shapes[m] for m in targets}
    about = {id: _about(population[id]) for id in seen}
    empty = [id for id in seen if about[id].num_examples < 1]
    if empty:
        raise Failure(
            f"data: {len(empty)} clients have no training examples, first {empty[0]!r} (task "
            f"{population[empty[0]].task!r}); expected at least one. Leave them out, or keep them "
            "as unseen clients (data.unseen.clients).",
            DATA,
        )
    specs, notes = build_ranks(config, seen, shapes, method, about)
    clients = {
        id: Client(id, specs[id], about[id].num_examples, task.task, task.category)
        for id, task in ((id, population[id]) for id in seen if id in specs)
    }
    federation = config.federation
    size = cohort_size(config, len(clients))
    with blame(USAGE, "lora.changes"):
        changes = build_changes(config, clients, shapes)
    schedule = Schedule(federation.rounds, size, federation.drop_out, federation.setting, changes)
    with blame(USAGE, "federation"):
        suits(method, list(clients.values()), schedule)
    training = local_training(config, method)
    return Experiment(
        config, population, seen, unseen, method, clients, schedule, training, shapes, notes
    )


def build_population(config: Config) -> tuple[Population, tuple[str, ...], tuple[str, ...]]:
    """All clients, the ids that may be sampled, and the ids kept out.

    Raises:
        Failure: data that cannot be read, or a split that leaves nobody on one side.
    """
    data = config.data
    settings = data.settings if data.path is None else {**data.settings, "path": data.path}
    with blame(DATA, "data"), blame(USAGE, "data", (SettingError,)):
        population = load_population(data.kind, **settings)
        unseen = data.unseen.model_dump(exclude={"seed"}, exclude_defaults=True)
        if not unseen.keys() - {"by"}:
            return population, tuple(sorted(population)), ()
        held = hold_out(population, **unseen, seed=data.unseen.seed)
    return population, tuple(sorted(held.seen)), tuple(sorted(held.unseen))


def build_method(config: Config) -> Method:
    """The method that a configuration names.

    Raises:
        ValueError: unknown, or a setting it does not have.
    """
    name, settings = config.method.name, config.method.settings
    if name in BOUNDS:
        if settings:
            raise ValueError(f"{name} has no setting {next(iter(settings))!r}; it has none.")
        return make("flexlora")
    if ":" not in name:
        if name not in known_methods:
            raise ValueError(f"unknown method {name!r}; {nearest(name, [*known_methods, *BOUNDS])}")
        return make(name, **settings)
    method = plugin(name)(**settings)
    if not isinstance(method, Method):
        raise TypeError(f"{name} returned a {type(method).__name__}; expected a flexlora Method.")
    return method


def _about(task: Task) -> About:
    return About(task.sizes.get("train", 0), task.category)


def build_ranks(
    config: Config,
    seen: tuple[str, ...],
    shapes: Shapes,
    method: Method,
    about: Mapping[str, About],
) -> tuple[dict[str, LoraSpec], tuple[str, ...]]:
    """What each seen client trains, and notes on how the plan had to be read.

    Raises:
        Failure: a plan that cannot be dealt out, a pattern that matches no module, or a rank above
            what a module's shape allows.
    """
    lora = config.lora
    types: tuple[Ranks, ...] = lora.types or PAPER_TYPES
    with blame(USAGE, "lora.r"):
        plan: Any = lora.r
        ranks = assign(seen, plan, config.federation.seed, types, about)
        specs = {c: LoraSpec(r, lora.lora_alpha, lora.alpha_rule) for c, r in ranks.items()}
        left = len(seen) - len(ranks)
        notes: tuple[str, ...] = (f"{left} clients are excluded by their rank.",) if left else ()
        mixed = len({json.dumps(r) for r in ranks.values()}) > 1
        if mixed and not method.mixed_ranks:
            lowest = {m: min(s.rank(m) for s in specs.values()) for m in shapes}
            one: Ranks = lowest if len(set(lowest.values())) > 1 else min(lowest.values())
            specs = dict.fromkeys(ranks, LoraSpec(one, lora.lora_alpha, lora.alpha_rule))
            notes = (
                *notes,
                f"{method.name} needs one rank for everybody, so all train at the smallest, "
                f"{min(lowest.values())}.",
            )
        insist_on_room(specs, shapes)
    return specs, notes


def insist_on_room(specs: Mapping[str, LoraSpec], shapes: Shapes) -> None:
    """No client may have a rank above what a module's shape allows.

    Raises:
        ValueError: names the first such module, how many there are, and the largest rank that fits.
    """
    distinct = {json.dumps(spec.r): (client, spec) for client, spec in specs.items()}
    for client, spec in distinct.values():
        small = [m for m, shape in shapes.items() if spec.rank(m) > min(shape)]
        if small:
            module, shape = small[0], shapes[small[0]]
            names = ", ".join(dict.fromkeys(m.rpartition(".")[2] for m in small))
            raise ValueError(
                f"client {client!r} has rank {spec.rank(module)} at module {module!r} of shape "
                f"{shape}: too high for {len(small)} of {len(shapes)} target modules ({names}). "
                f"The largest that fits them all is {min(map(min, shapes.values()))}: lower lora.r "
                "or lora.types (whose default goes up to 200), or leave those modules out of "
                "lora.target_modules."
            )


def build_changes(
    config: Config, clients: Mapping[str, Client], shapes: Shapes
) -> dict[int, dict[str, Client | None]]:
    """Round -> what some clients are from then on.

    Raises:
        ValueError: an unknown client, or a rank above the largest that the server keeps.
    """
    found: dict[int, dict[str, Client | None]] = {}
    for round, ranks in sorted(config.lora.changes.items()):
        for id, r in ranks.items():
            if id not in clients:
                raise ValueError(f"round {round}: client {id!r} is unknown; {nearest(id, clients)}")
            largest = min(max(c.lora.rank(m) for c in clients.values()) for m in shapes)
            if r > largest:
                raise ValueError(
                    f"round {round}: client {id!r} gets rank {r}, but the plan's largest is "
                    f"{largest}, and the server keeps no more. Lower it or raise the plan."
                )
            spec = LoraSpec(r, config.lora.lora_alpha, config.lora.alpha_rule) if r else None
            changed = replace(clients[id], lora=spec) if spec else None
            found.setdefault(round, {})[id] = changed
    return found


def cohort_size(config: Config, registered: int) -> int:
    """Clients invited each round; what the setting implies where nothing is said.

    Raises:
        Failure: more than there are.
    """
    federation = config.federation
    asked = federation.clients_per_round
    silo = federation.setting == "cross-silo"
    if asked is None:
        asked = registered if silo else 0.05
    size = max(1, round(asked * registered)) if isinstance(asked, float) else asked
    if size > registered:
        raise Failure(
            f"federation.clients_per_round: {size}, but only {registered} clients are registered "
            "(unseen ones are kept out). Lower it, or register more."
        )
    return size


def local_training(config: Config, method: Method) -> LocalTraining:
    """The settings of the local loop."""
    settings = config.training.model_dump(exclude={"max_length", "train_on_prompt"})
    settings["optimizer"] = settings["optimizer"] or method.optimizer or "adamw"
    settings = {name: value for name, value in settings.items() if value != "auto"}
    return LocalTraining(**settings, lora_dropout=config.lora.lora_dropout)
