"""What a deployed run is made of: its terms, its model, its people and their ranks."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from flexlora.adapter import Adapter, LoraSpec, Shapes, initial_adapter, select
from flexlora.engines.embedded import Prompting
from flexlora.engines.flower.grid import Flower
from flexlora.engines.flower.node import common
from flexlora.engines.flower.roster import Member, Roster
from flexlora.experiment import runs
from flexlora.experiment.build import build_method, local_training
from flexlora.experiment.config import Config
from flexlora.experiment.console import Console
from flexlora.experiment.errors import MODEL, Failure, blame
from flexlora.experiment.initial import warm
from flexlora.experiment.load import load_config
from flexlora.experiment.status import Board
from flexlora.federation.ranks import PAPER_TYPES, assign
from flexlora.federation.state import Client, Method, ServerState
from flexlora.training.models import Base, load_base


@dataclass(frozen=True)
class Terms:
    """What `flwr run -c` sets beside the YAML file.

    Attributes:
        config: the YAML file, on the server.
        output_dir: the run directory; an existing one is gone on with.
        min_nodes: connected before the first round.
        deadline: seconds after which a round ends with whoever has answered.
        over_selection: share of people invited beyond `clients_per_round`; a round closes when
            that many have answered.
        start_within: seconds to wait for `min_nodes`.
    """

    config: str
    output_dir: str
    min_nodes: int = 2
    deadline: float = 3600.0
    over_selection: float = 0.0
    start_within: float = 600.0


@dataclass(frozen=True, eq=False)
class Server:
    """What the loop works with."""

    config: Config
    folder: Path
    terms: Terms
    method: Method
    base: Base
    shapes: Shapes
    rank: int
    roster: Roster
    flower: Flower
    board: Board
    console: Console


def open_server(grid: Grid, terms: Terms, console: Console) -> Server:
    """Everything but the nodes: configuration, run directory, model, method.

    Raises:
        Failure: what cannot be used.
    """
    folder = Path(terms.output_dir)
    if (folder / "config.yaml").is_file():
        config = runs.open_run(folder)
    else:
        config = load_config(terms.config, ["--output_dir", terms.output_dir])
        runs.create(config, folder.name)
    with blame(MODEL, "model"):
        base = load_base(config.model.name_or_path, config.model.dtype, config.model.device)
        shapes = {m: base.shapes[m] for m in select(base.shapes, config.lora.target_modules)}
    runs.identify(folder, base.name, base.fingerprint)
    method = build_method(config)
    if not method.stateless:
        raise Failure(
            f"method {method.name!r} needs clients that keep factors between rounds, which this "
            "engine does not store. Use a stateless method (flexlora methods), or one machine."
        )
    about = identity(folder)
    roster = Roster(grid, common(base), config.lora.target_modules, about["enrolled"], console.say)
    flower = Flower(grid, {}, config.federation.wire, about["run"], told(config, method))
    flower.deadline = terms.deadline
    board = Board(folder, config.federation.rounds)
    return Server(
        config, folder, terms, method, base, shapes, ceiling(config), roster, flower, board, console
    )


def identity(folder: Path) -> dict[str, Any]:
    """The run's own name on the wire, and who has enrolled with how much; made once."""
    path = folder / "federation.json"
    if not path.is_file():
        runs.write(path, json.dumps({"run": uuid.uuid4().hex, "enrolled": {}}))
    return runs.read(path)


def told(config: Config, method: Method) -> dict[str, Any]:
    """What nodes are told: the local loop is the server's decision."""
    data, training = config.data, config.training
    prompting = Prompting(data.template, training.max_length, training.train_on_prompt, data.system)
    return {
        "training": asdict(local_training(config, method)),
        "prompting": asdict(prompting),
        "seed": config.federation.seed,
    }


def ceiling(config: Config) -> int:
    """The server's rank: the largest that anyone may be given.

    Raises:
        Failure: ranks that differ between modules.
    """
    r, types = config.lora.r, config.lora.types or PAPER_TYPES
    if isinstance(r, int):
        return r
    if isinstance(r, dict):
        values: list[Any] = [k if isinstance(v, float) else v for k, v in r.items()]
    else:
        values = list(types if isinstance(r, str) else r)
    if not all(isinstance(v, int) for v in values):
        raise Failure("lora.r: over Flower a client has one rank for all modules; set numbers.")
    return int(max(values))


def first_state(server: Server) -> ServerState:
    """The state before round 1."""
    federation, ranks = server.config.federation, dict.fromkeys(server.shapes, server.rank)
    G: Adapter = initial_adapter(server.shapes, ranks, federation.seed)
    folder = server.config.lora.warm_start
    if folder is not None:
        fingerprint = server.base.fingerprint
        G = warm(Path(folder), server.shapes, ranks, fingerprint, federation.seed)
    state = ServerState(0, server.base.fingerprint, G, seed=federation.seed, wire=federation.wire)
    return server.method.start(state)


def clients_now(server: Server) -> list[Client]:
    """Connected members as clients, at the rank they want or the plan gives them."""
    members = server.roster.connected()
    while not members:
        server.console.say("nobody is connected; waiting")
        time.sleep(5.0)
        members = server.roster.connected()
    enrolled = {"run": server.flower.run, "enrolled": server.roster.enrolled}
    runs.write(server.folder / "federation.json", json.dumps(enrolled))
    server.flower.nodes = {c: m.node for c, m in members.items()}
    planned = plan(server, list(members))
    lora = server.config.lora
    found = []
    for client, member in members.items():
        rank = rank_of(member, planned[client], server)
        spec = LoraSpec(rank, lora.lora_alpha, lora.alpha_rule)
        found.append(Client(client, spec, member.examples, client))
    server.board.roster(found, server.roster.turned_away)
    return found


def plan(server: Server, clients: list[str]) -> dict[str, int]:
    """Ranks by the configuration's plan; one by one where it names clients."""
    r: Any = server.config.lora.r
    if isinstance(r, int):
        return dict.fromkeys(clients, r)
    if isinstance(r, dict) and not any(isinstance(v, float) for v in r.values()):
        return {c: int(r.get(c, server.rank)) for c in clients}
    types = server.config.lora.types or PAPER_TYPES
    dealt = assign(clients, r, server.config.federation.seed, types)
    return {c: int(rank) for c, rank in dealt.items()}  # type: ignore[arg-type]


def rank_of(member: Member, planned: int, server: Server) -> int:
    """The node's wish within the server's rank, or the plan; one for all if a method needs it."""
    if not server.method.mixed_ranks:
        return server.rank
    return min(member.wanted or planned, server.rank)
