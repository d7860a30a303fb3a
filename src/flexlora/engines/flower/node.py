"""What a node does when it is asked: greet, train, evaluate. It never raises and never quotes.

Training and evaluation are the embedded engine's, with one client. Whatever goes wrong is told to
the server as one of the enumerated reasons; the text of an error may hold training text and stays
in a file of the node's.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save

from flexlora.adapter import LoraSpec, select
from flexlora.data.task import Population
from flexlora.engines.embedded import Embedded, Prompting
from flexlora.engines.flower.answers import encode_update
from flexlora.engines.flower.messages import Parcel
from flexlora.engines.flower.replay import recall, remember, store
from flexlora.engines.flower.wire import VERSION, decode_payload, digest
from flexlora.federation.admission import Reason, Refusal
from flexlora.federation.state import Client, Payload, Update
from flexlora.training.client import LocalTraining
from flexlora.training.kept import recall as recall_own
from flexlora.training.memory import BYTES_PER_TRAINED_NUMBER, free_memory
from flexlora.training.models import Base


@dataclass(frozen=True, eq=False)
class Site:
    """What a node's operator decides and the server only asks about.

    Attributes:
        client: the id it takes part under.
        base: its own copy of the base model.
        population: its data; the server sees `client`'s counts, column names and category.
        folder: where answers are kept until they are acknowledged, the factors that stay here
            (`kept/`, one file per run), and errors.
        rank: the rank it wants, if it says.
        memory: bytes that training may take beside the model, if it says; turned into a rank.
    """

    client: str
    base: Base
    population: Population
    folder: Path
    rank: int | None = None
    memory: int | None = None


def answer(site: Callable[[], Site], folder: Path, kind: str, asked: Parcel) -> Parcel:
    """The reply to one message; a failure is a reply too.

    Args:
        site: opens the site; may be slow the first time.
        folder: of the node: errors are appended to its `errors.log`.
        kind: of the message.
        asked: what came.
    """
    try:
        return {"query.hello": hello, "train": train, "evaluate": evaluate}[kind](site(), asked)
    except Exception as error:
        with _private(folder / "errors.log") as log:
            log.write(time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime()) + kind + "\n")
            traceback.print_exception(error, file=log)
        reason = Reason.MEMORY if out_of_memory(error) else Reason.FAILED
        return Parcel({"reason": reason.value})


def hello(site: Site, asked: Parcel) -> Parcel:
    """Who is here, with which versions, model, data and means; content of the data never."""
    task, base = site.population[site.client], site.base
    example = next(iter(task.load("train")), None)
    columns = [c for c in ("instruction", "input", "output") if example and getattr(example, c)]
    about = {
        "flexlora": metadata.version("flexlora"),
        **common(base),
        "precision": _precision(base),
        "client": site.client,
        "rank": site.rank or _affordable(site, asked.about.get("targets", ())),
        "examples": dict(task.sizes),
        "columns": columns,
        "category": task.category,
        "device": base.device.type,
        "memory": free_memory(base),
        "cores": psutil.cpu_count() or 1,
    }
    return Parcel(about)


def common(base: Base) -> dict[str, Any]:
    """What a node and its server must have in common: wire format, model, tokenizer, template."""
    return {
        "wire": VERSION,
        "base": base.fingerprint,
        "tokenizer": digest(repr(sorted(base.tokenizer.get_vocab().items())).encode()),
        "template": digest(str(base.tokenizer.chat_template).encode()),
    }


def _precision(base: Base) -> str:
    method = getattr(getattr(base.model, "config", None), "quantization_config", None)
    return f"{base.dtype}".removeprefix("torch.") + (", quantized" if method else "")


def _affordable(site: Site, targets: list[str]) -> int | None:
    """The rank whose factors, gradients and optimiser state fit the memory that was granted."""
    if site.memory is None:
        return None
    sides = sum(sum(site.base.shapes[m]) for m in select(site.base.shapes, targets))
    return max(1, site.memory // (BYTES_PER_TRAINED_NUMBER * sides))


def train(site: Site, asked: Parcel) -> Parcel:
    """One local round; the same payload again gets the same bytes again, without training."""
    answers = digest(asked.data)
    known = recall(site.folder, answers, asked.about.get("acknowledged", ""))
    if known is not None:
        return Parcel({}, known)
    payload = decode_payload(asked.data)
    if refusal := _mismatch(site, payload):
        return refusal
    engine = _engine(site, asked.about)
    update = fitted(engine, payload, _client(site), asked.about.get("lower_rank", True))
    if engine.memory:  # before the answer; the factors of two rounds, so it can be made again
        kept = {name: x.contiguous() for name, x in engine.memory.items()}
        store(_own(site, asked.about), save(kept))
    data = encode_update(update, payload, answers, asked.about["wire"])
    remember(site.folder, answers, data)
    return Parcel({}, data)


def evaluate(site: Site, asked: Parcel) -> Parcel:
    """Scores of the adapter that came, on this node's data: means and counts, never answers."""
    payload, wanted = decode_payload(asked.data), asked.about["evaluation"]
    if refusal := _mismatch(site, payload):
        return refusal
    engine = _engine(site, asked.about)
    found = engine.evaluate(
        {site.client: recall_own(engine.kept, payload).adapter},
        {module: terms[0] for module, terms in payload.frozen.items()},
        wanted["split"],
        set(wanted["metrics"]),
        wanted["max_examples"],
        wanted["max_generated"],
        wanted["max_new_tokens"],
    )[site.client]
    return Parcel({"values": dict(found.values), "examples": found.examples})


def fitted(engine: Embedded, payload: Payload, client: Client, lower_rank: bool = True) -> Update:
    """Train at the rank that was sent; where memory does not suffice, at half of it, declared.

    The head of an adapter in SVD order is its best approximation, so a fallback loses the least.
    `lower_rank` says whether the method can do with one.
    """
    tried = payload
    while True:
        try:
            update = next(iter(engine.train([tried], {client.id: client})))
            if isinstance(update, Refusal):
                raise ValueError(update.message)
            return replace(update, reduced=tried is not payload)
        except (MemoryError, RuntimeError) as error:
            rank = max(d.rank for d in tried.adapter.values())
            if not out_of_memory(error) or rank == 1 or payload.mask or not lower_rank:
                raise
        heads = {m: d.prefix(min(d.rank, rank // 2)).clone() for m, d in tried.adapter.items()}
        tried = replace(tried, adapter=heads)


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error says; torch on a CPU has no class for it."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in text or "not enough mem" in text)
    )


def _mismatch(site: Site, payload: Payload) -> Parcel | None:
    if payload.base != site.base.fingerprint:
        return Parcel({"reason": Reason.BASE.value})
    if payload.client != site.client:
        return Parcel({"reason": Reason.UNKNOWN_CLIENT.value})
    return None


def _engine(site: Site, about: Mapping[str, Any]) -> Embedded:
    """The embedded engine with the server's settings, and with what this node has kept of the run.

    Clients of a node do not share a bank.
    """
    settings = dict(about["training"])
    schedule = {int(r): float(f) for r, f in settings.pop("round_schedule", {}).items()}
    training = LocalTraining(**{**settings, "group_size": 1}, round_schedule=schedule)
    prompting = Prompting(**about["prompting"])
    engine = Embedded(site.base, site.population, training, about["seed"], prompting)
    if (own := _own(site, about)).is_file():
        # Copies in torch's own memory: matrix products round differently at other alignments.
        engine.restore({name: x.clone() for name, x in load_file(own).items()})
    return engine


def _own(site: Site, about: Mapping[str, Any]) -> Path:
    """Where the factors are that stay at this node, of one run."""
    return site.folder / "kept" / f"{digest(str(about.get('run')).encode())[:32]}.safetensors"


def _client(site: Site) -> Client:
    task = site.population[site.client]
    return Client(site.client, LoraSpec(1), task.sizes["train"], task.task, task.category)


def _private(path: Path) -> Any:
    """A file to append to that only its owner reads."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a")
