"""An engine for tests: client k pulls its product towards a target matrix of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from flexlora.adapter import LoraSpec, initial_adapter, stable_seed
from flexlora.federation.admission import Refusal
from flexlora.federation.state import Client, Payload, ServerState, Update
from flexlora.lowrank import LowRank

SHAPES = {"layer.0.q_proj": (24, 20), "layer.0.up_proj": (36, 20)}


def people(ranks: Sequence[int], alpha: float = 24.0) -> list[Client]:
    return [Client(f"c{i}", LoraSpec(r, alpha), 10 * (i + 1)) for i, r in enumerate(ranks)]


def start(clients: Sequence[Client], shapes=SHAPES, **more) -> ServerState:
    ranks = {m: max(c.lora.rank(m) for c in clients) for m in shapes}
    return ServerState(0, "base", initial_adapter(shapes, ranks, seed=3), seed=3, **more)


def target(client: str, module: str, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(stable_seed("target", client, module))
    common = torch.Generator().manual_seed(stable_seed("target", module))
    return torch.randn(shape, generator=common) + 0.3 * torch.randn(shape, generator=generator)


@dataclass(frozen=True)
class Quadratic:
    """AdamW on `1/2 ||s B A - T_k||^2 / d_out`, answering in a shuffled order."""

    steps: Mapping[str, int] = field(default_factory=dict)
    learning_rate: float = 0.02
    order: int = 0
    tamper: Callable[[Update], Sequence[Update | Refusal]] = lambda update: [update]

    def train(
        self, payloads: Sequence[Payload], clients: Mapping[str, Client]
    ) -> Iterator[Update | Refusal]:
        shuffled = list(payloads)
        random.Random(self.order).shuffle(shuffled)
        for payload in shuffled:
            yield from self.tamper(self.one(payload, clients[payload.client]))

    def one(self, payload: Payload, client: Client) -> Update:
        adapter, loss = {}, 0.0
        for module, d in payload.adapter.items():
            T = target(client.id, module, d.shape)
            B, A = d.B.clone().requires_grad_(), d.A.clone().requires_grad_()
            optimizer = torch.optim.AdamW([B, A], self.learning_rate, weight_decay=0.0)
            for _ in range(self.steps.get(client.id, 5)):
                optimizer.zero_grad()
                objective = ((d.scaling * B @ A - T) ** 2).sum() / (2 * len(T))
                objective.backward()
                optimizer.step()
                loss = objective.item()
            adapter[module] = LowRank(B, A, d.scaling)
        examples, metrics = client.num_examples, {"loss": loss}
        return Update(client.id, payload.round, payload.base, adapter, examples, metrics)
