"""Ranks over Flower: people come and go, so a plan is dealt over everyone who has enrolled."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

from flexlora.adapter import LoraSpec, Shapes, matches
from flexlora.engines.flower.roster import Member
from flexlora.experiment.build import BOUNDS
from flexlora.experiment.config import Config
from flexlora.experiment.errors import USAGE, Failure, blame
from flexlora.federation.ranks import PAPER_TYPES, About, Ranks, assign
from flexlora.federation.state import Method

QUANTIZED = (
    "model.load_in_4bit, load_in_8bit: not over Flower; a quantized base has a fingerprint of "
    "its own, and all sites and the server must hold the same base."
)

ANYBODY = dict.fromkeys("abcd", About(1))
"""Stand-ins, to refuse a wrong plan before anyone is there: it is wrong for any four clients."""

SAME = ("mean-of-", "highest-of-")
"""Plans that give everybody the same, which is settled when the run begins."""

Top = Mapping[str, int]
"""Module -> the server's rank: the most that anyone is given there."""


def insist_on_served(config: Config, method: Method) -> None:
    """Refuse, before anything starts, what this engine does not do.

    Raises:
        Failure: all of it, a sentence each.
    """
    if found := list(_unserved(config, method)):
        raise Failure("\n".join(found), USAGE)


def _unserved(config: Config, method: Method) -> Iterator[str]:
    name, kept = config.method.name, config.checkpoints
    if name in BOUNDS:
        yield f"method.name: {name!r} is no federation, so there is nothing to do over Flower."
    if not method.stateless and config.federation.setting == "cross-device":
        yield (
            f"federation.setting: the clients of {name!r} keep factors between rounds, so all take "
            "part in each; set cross-silo."
        )
    if config.model.bits:
        yield QUANTIZED
    if config.federation.drop_out:
        yield "federation.drop_out: over Flower nodes really drop out, it is not simulated; set 0."
    for setting in ("early_stopping_patience", "load_best_at_end"):
        if getattr(kept, setting):
            yield f"checkpoints.{setting}: over Flower nothing is measured between rounds."
    if isinstance(config.lora.r, tuple):
        yield (
            "lora.r: a list goes by the order of all clients, and over Flower nobody knows who "
            "will come. Write {client id: rank}, or a distribution's name."
        )
    if not method.mixed_ranks and any(_changed(config)):
        yield f"lora.changes: method {name!r} needs one rank for everybody; only 0 is possible."


def server_ranks(
    config: Config, shapes: Shapes, method: Method, people: Mapping[str, About] = ANYBODY
) -> dict[str, int]:
    """The largest ranks that the plan can hand out; the smallest for methods that need one rank.

    Args:
        config: with the plan.
        shapes: module -> (outputs, inputs).
        method: whether it needs one rank for everybody.
        people: who is there when the run begins: one rank for everybody is taken from what the
            plan deals to them.

    Raises:
        Failure: a plan that cannot be read, or a rank above what a module's shape allows.
    """
    specs = [LoraSpec(r) for r in _possible(config, shapes, method, people)]
    choose = max if method.mixed_ranks else min
    with blame(USAGE, "lora.r"):
        top = {m: choose(s.rank(m) for s in specs) for m in shapes}
        for module, rank in top.items():
            if rank > min(shapes[module]):
                raise ValueError(
                    f"rank {rank} at module {module!r} of shape {shapes[module]}; a rank is at "
                    f"most {min(shapes[module])}. Lower it or leave the module out."
                )
    largest, kept = max(_changed(config), default=0), min(top.values())
    if largest > kept:
        raise Failure(
            f"lora.changes: rank {largest}; the plan's largest is {kept}, and the server keeps no "
            "more. Lower it or raise the plan.",
            USAGE,
        )
    return top


def _possible(
    config: Config, shapes: Shapes, method: Method, people: Mapping[str, About]
) -> tuple[Ranks, ...]:
    """What the plan could give to anyone; what it gives to `people` where all get one rank."""
    r: Any = config.lora.r
    types = tuple(config.lora.types or PAPER_TYPES)
    if _shares(r) or isinstance(r, str):
        with blame(USAGE, "lora.r"):
            dealt = assign(sorted(people), r, config.federation.seed, types, people)
        if not method.mixed_ranks or str(r).startswith(SAME):
            return tuple(dealt.values())
        if _shares(r):
            return tuple(rank for rank, share in r.items() if share)
        return types[:1] if r.endswith("homogeneous") else types
    if isinstance(r, dict) and not _by_module(r, shapes):
        return tuple(r.values())
    return (r,)


def _shares(r: object) -> bool:
    return isinstance(r, dict) and any(isinstance(v, float) for v in r.values())


def _by_module(r: Mapping[object, object], modules: Collection[str]) -> bool:
    """Whether a plan's keys are module patterns and no clients."""
    return all(any(matches(str(key), m) for m in modules) for key in r)


def deal(
    config: Config,
    method: Method,
    top: Top,
    members: Mapping[str, Member],
    enrolled: Mapping[str, About],
    round: int,
) -> dict[str, Ranks | str]:
    """Each member's ranks in a round, or why it takes no part in it.

    A member's own wish stands above the plan, the server's rank above both. `lora.changes` replaces
    the plan, and no wish goes beyond it. A plan that names clients is the list of who takes part.

    Args:
        config: with the plan.
        method: whether it needs one rank for everybody.
        top: the server's ranks.
        members: who is connected.
        enrolled: everyone who ever was: the plan is dealt over them.
        round: the coming round, from 1.
    """
    planned = _plan(config, top, enrolled)
    found: dict[str, Ranks | str] = {}
    for client, member in members.items():
        changed, wanted = _change(config, round, client), member.wanted
        if changed == 0:
            found[client] = f"lora.changes leaves it out in round {round}"
        elif changed is None and client not in planned:
            found[client] = "lora.r gives it no rank"
        elif method.mixed_ranks:
            wish = min(wanted or changed, changed) if changed else wanted
            found[client] = capped(wish or planned[client], top)
        elif wanted and wanted < max(top.values()):
            found[client] = (
                f"it wants rank {wanted}; {method.name} needs {max(top.values())} of all"
            )
        else:
            found[client] = capped(max(top.values()), top)
    return found


def _plan(config: Config, top: Top, enrolled: Mapping[str, About]) -> dict[str, Ranks]:
    ids, r = sorted(enrolled), cast(Any, config.lora.r)
    if isinstance(r, dict) and not _shares(r):
        return {c: r for c in ids} if _by_module(r, top) else {c: r[c] for c in ids if c in r}
    if str(r).startswith(SAME):
        return dict.fromkeys(ids, top)
    return assign(ids, r, config.federation.seed, config.lora.types or PAPER_TYPES, enrolled)


def _changed(config: Config) -> Iterator[int]:
    return (rank for step in config.lora.changes.values() for rank in step.values())


def _change(config: Config, round: int, client: str) -> int | None:
    """What `lora.changes` says of a client as of a round, if anything."""
    steps = [s for r, s in sorted(config.lora.changes.items()) if r <= round and client in s]
    return steps[-1][client] if steps else None


def capped(r: Ranks, top: Top) -> Ranks:
    """No more than the server has; one number where it is the same everywhere.

    >>> capped(8, {"q": 4, "v": 16}), capped(2, {"q": 4, "v": 16})
    ({'q': 4, 'v': 8}, 2)
    """
    spec = LoraSpec(r)
    ranks = {m: min(spec.rank(m), most) for m, most in top.items()}
    same = len(set(ranks.values())) == 1
    return next(iter(ranks.values())) if same else ranks
