"""What a deployed run is made of: its terms, its model, its people and their ranks."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from flexlora.adapter import Adapter, LoraSpec, Shapes, initial_adapter, select
from flexlora.engines.embedded import Prompting
from flexlora.engines.flower.grid import Flower
from flexlora.engines.flower.node import common
from flexlora.engines.flower.roster import Roster
from flexlora.experiment import runs
from flexlora.experiment.build import build_method, local_training
from flexlora.experiment.config import Config
from flexlora.experiment.console import Console
from flexlora.experiment.dealing import Top, deal, insist_on_served, server_ranks
from flexlora.experiment.errors import MODEL, USAGE, blame
from flexlora.experiment.initial import warm
from flexlora.experiment.load import load_config
from flexlora.experiment.status import Board
from flexlora.experiment.trackers import require
from flexlora.federation.ranks import About
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
    top: Top
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
    with blame(USAGE, "method"):
        method = build_method(config)
    insist_on_served(config, method)
    require(config.report_to)
    with blame(MODEL, "model"):
        base = load_base(config.model.name_or_path, config.model.dtype, config.model.devices[0])
        shapes = {m: base.shapes[m] for m in select(base.shapes, config.lora.target_modules)}
    runs.identify(folder, base.name, base.fingerprint)
    top = server_ranks(config, shapes, method)
    about = identity(folder)
    enrolled = {client: About(**row) for client, row in about["enrolled"].items()}
    roster = Roster(grid, common(base), config.lora.target_modules, enrolled, console.say)
    flower = Flower(grid, {}, config.federation.wire, about["run"], told(config, method))
    flower.deadline = terms.deadline
    board = Board(folder, config.federation.rounds)
    return Server(config, folder, terms, method, base, shapes, top, roster, flower, board, console)


def identity(folder: Path) -> dict[str, Any]:
    """The run's own name on the wire, and who has enrolled with how much; made once.

    With `ranks`, the server's, as soon as enough people are there.
    """
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
        "lower_rank": method.mixed_ranks,
    }


def settled(server: Server) -> Server:
    """The server at its ranks for the whole run: found once, when enough people are there.

    Raises:
        Failure: a rank above what a module's shape allows.
    """
    top = identity(server.folder).get("ranks")
    if top is None:
        top = server_ranks(server.config, server.shapes, server.method, server.roster.enrolled)
    server = replace(server, top=top)
    _remember(server)
    return server


def _remember(server: Server) -> None:
    enrolled = {c: asdict(a) for c, a in server.roster.enrolled.items()}
    about = {"run": server.flower.run, "ranks": server.top, "enrolled": enrolled}
    runs.write(server.folder / "federation.json", json.dumps(about))


def first_state(server: Server) -> ServerState:
    """The state before round 1."""
    federation, ranks = server.config.federation, server.top
    G: Adapter = initial_adapter(server.shapes, ranks, federation.seed)
    folder = server.config.lora.warm_start
    if folder is not None:
        fingerprint = server.base.fingerprint
        G = warm(Path(folder), server.shapes, ranks, fingerprint, federation.seed)
    state = ServerState(0, server.base.fingerprint, G, seed=federation.seed, wire=federation.wire)
    return server.method.start(state)


def clients_now(server: Server, round: int) -> list[Client]:
    """Connected members as clients of a round, at the ranks they want or the plan gives them."""
    while not (found := _clients(server, round)):
        server.console.say("nobody who could take part is connected; waiting")
        time.sleep(5.0)
    return found


def _clients(server: Server, round: int) -> list[Client]:
    members, enrolled = server.roster.connected(), server.roster.enrolled
    _remember(server)
    server.flower.nodes = {c: m.node for c, m in members.items()}
    lora, found, away = server.config.lora, list[Client](), dict(server.roster.turned_away)
    dealt = deal(server.config, server.method, server.top, members, enrolled, round)
    for client, ranks in dealt.items():
        member = members[client]
        if isinstance(ranks, str):
            away[member.node] = f"{client}: {ranks}"
        else:
            spec = LoraSpec(ranks, lora.lora_alpha, lora.alpha_rule)
            about = enrolled[client]
            found.append(Client(client, spec, member.examples, client, about.category))
    server.board.roster(found, away)
    return found
