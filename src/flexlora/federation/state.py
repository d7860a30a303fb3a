"""The values that pass between server, clients and methods. Everything here is frozen data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from flexlora.adapter import Adapter, LoraSpec
from flexlora.lowrank import LowRank, Mask

Factors = Literal["AB", "A", "B", ""]
Wire = Literal["float32", "bfloat16", "float16"]
Optimizer = Literal["adamw", "sgd"]
Term = LowRank | Tensor
"""A frozen addition to a base weight: a product, or dense `(d_out, d_in)` where that is smaller."""


@dataclass(frozen=True)
class Client:
    """One participant: what it trains and how much it has; its text stays behind its id.

    Attributes:
        id: unique in the federation; updates are sorted by it.
        lora: rank and scaling per module.
        num_examples: training examples, its weight in averages.
        task: what its data is, for people.
        category: group of tasks, for reports and splits.
    """

    id: str
    lora: LoraSpec
    num_examples: int
    task: str = ""
    category: str = ""


@dataclass(frozen=True)
class ServerState:
    """Everything that passes from one round to the next, and so everything in a checkpoint.

    The effective model is `W0 + patch + G`.

    Attributes:
        round: the last finished round; 0 before the first.
        base: fingerprint of the frozen base model.
        G: the global trainable part at the largest rank, scaling 1, components in the order in
            which clients take them: the first r at rank r. Product methods hold `(U S, Vh)`.
        patch: what was merged into the base so far, per module; empty for most methods.
        aux: whatever else a method must remember, as flat tensors.
        seed: of the run; what a method draws is a function of it, the round and the module.
        wire: precision at which payloads travel. A method that subtracts what it sent needs it.
    """

    round: int
    base: str
    G: Adapter
    patch: Mapping[str, Term] = field(default_factory=dict)
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    wire: Wire = "float32"


@dataclass(frozen=True)
class Penalty:
    """A local loss term a method asks for, by name, with its coefficient: training/penalties.py."""

    name: Literal["prox", "tail"]
    coefficient: float
    gamma: float = 1.0


@dataclass(frozen=True)
class Payload:
    """What a client is sent: self-contained, so that a fresh process can act on it.

    Attributes:
        client: id of the receiver.
        round: the round it is to train in, from 1.
        base: fingerprint of the base model it must be applied to.
        adapter: where its training starts, at its own rank and scaling.
        frozen: terms added to the base and not trained (patches, folds).
        train: which factors move.
        keep: factors that stay at the client: it starts from those it last had (the payload's, if
            none) and does not upload them. Never set for a `stateless` method.
        known: factors that need not travel, because a receiver can make them: `A` by
            `initial_adapter` from `seed`, `B` zero, or its own where it keeps them. The adapter
            here is complete all the same.
        seed: of the initial factors, where they are known.
        mask: where set, training is sparse: `adapter[m].B (count, 1)` holds the values added to the
            base weight at `mask[m].positions()`, `A` is a one that is not trained.
        penalty: an extra term of the local loss, or None.
    """

    client: str
    round: int
    base: str
    adapter: Adapter
    frozen: Mapping[str, tuple[Term, ...]] = field(default_factory=dict)
    train: Factors = "AB"
    keep: Factors = ""
    known: Factors = ""
    seed: int = 0
    mask: Mapping[str, Mask] = field(default_factory=dict)
    penalty: Penalty | None = None


@dataclass(frozen=True)
class Update:
    """What a client returns.

    Attributes:
        client: its id.
        round: the round it was trained in.
        base: as in the payload it answers.
        adapter: the client's factors with their scaling. Those that were not trained, or that the
            client keeps, are the payload's: they do not travel.
        num_examples: training examples behind it.
        metrics: numbers for people: loss, tokens, steps, seconds.
        reduced: declares a rank below what was sent (a memory fallback); refused unless allowed.
    """

    client: str
    round: int
    base: str
    adapter: Adapter
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    reduced: bool = False


class Updates(Protocol):
    """A round's admitted updates as methods read them: re-iterable, sorted by client id.

    Read one module at a time, so that memory does not grow with modules x clients.
    """

    @property
    def clients(self) -> tuple[str, ...]:
        """Ids, ascending."""

    @property
    def num_examples(self) -> tuple[int, ...]:
        """In the order of `clients`."""

    @property
    def weights(self) -> tuple[float, ...]:
        """`p_k = n_k / sum n_j` over the admitted updates, in the order of `clients`."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Module paths, in the model's order."""

    def module(self, name: str) -> list[LowRank]:
        """Every client's product at one module, in the order of `clients`."""

    def __len__(self) -> int:
        """Number of admitted updates."""


@dataclass(frozen=True)
class Method:
    """A federated algorithm: a few pure functions and what is true of them.

    Attributes:
        name: as users write it.
        downlink: `(state, client) -> Payload`.
        aggregate: `(state, updates) -> ServerState`; advances `round`, never called with nobody.
        view: `(state, client or None) -> Adapter`: the model that is evaluated, without the patch;
            None means the whole global model, a client means what it would be handed.
        mixed_ranks: whether clients may differ in rank; engines refuse a mixed federation if not.
        exact: whether the new effective weight equals `sum p_k D_k` before any truncation.
        linear: whether the new state depends on the updates only through weighted sums over clients
            (of products, or of factors padded to one rank), so that a secure sum can serve it.
        averages: what the server averages: products (the basis changes with every SVD), factors
            (the basis stays), or what it merges into the patch.
        stateless: whether clients keep nothing between rounds (needed in cross-device settings).
        prunes: whether a payload may hold a lower rank than its client's `LoraSpec` names.
        optimizer: the local optimiser of its paper, used where the training settings name none.
        trains: for people: what a client trains.
        up: for people: floats a client uploads per module, in `r` (its rank), `d_out`, `d_in`.
        down: for people: floats a client downloads per module.
        citation: author, title, arXiv id.
        start: the state before round 1, from one that holds the initial adapter or a warm start.
    """

    name: str
    downlink: Callable[[ServerState, Client], Payload]
    aggregate: Callable[[ServerState, Updates], ServerState]
    view: Callable[[ServerState, Client | None], Adapter]
    mixed_ranks: bool
    exact: bool = False
    linear: bool = False
    averages: Literal["products", "factors", "patch"] = "products"
    stateless: bool = True
    prunes: bool = False
    optimizer: Optimizer | None = None
    trains: str = "A, B"
    up: str = "r (d_out + d_in)"
    down: str = "r (d_out + d_in)"
    citation: str = ""
    start: Callable[[ServerState], ServerState] = lambda state: state


def floats_down(payload: Payload) -> int:
    """Numbers that must travel to the client: its factors less what it knows, and frozen terms."""
    factors = sum(_count(d, "AB", payload.known) for d in payload.adapter.values())
    return factors + sum(_size(term) for terms in payload.frozen.values() for term in terms)


def floats_up(payload: Payload) -> int:
    """Numbers that come back: the factors that are trained and not kept by the client."""
    return sum(_count(d, payload.train, payload.keep) for d in payload.adapter.values())


def _count(d: LowRank, factors: Factors, less: Factors) -> int:
    return sum(getattr(d, f).numel() for f in factors if f not in less)


def _size(term: Term) -> int:
    return term.numel() if isinstance(term, Tensor) else term.B.numel() + term.A.numel()


def ranks_of(adapter: Adapter) -> dict[str, int]:
    """Module -> rank really held, for records and run-time checks."""
    return {m: d.rank for m, d in adapter.items()}


def iterate(updates: Updates) -> Iterator[tuple[str, list[LowRank]]]:
    """`(module, every client's product)` for each module in turn."""
    for name in updates.modules:
        yield name, updates.module(name)
