"""The default engine: all clients of a round on one base model in this process; no server."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock

from torch import Tensor

from flexlora.adapter import Adapter
from flexlora.data.task import Example, Population, Split
from flexlora.data.templates import AnswerTooLong, Template, Tokens, encode
from flexlora.federation.admission import Reason, Refusal
from flexlora.federation.state import Client, Payload, Term, Update
from flexlora.training import evaluate as scoring
from flexlora.training.client import Job, LocalTraining, Progress, train
from flexlora.training.devices import train_on
from flexlora.training.evaluate import Exam, Metric, Scores, digest
from flexlora.training.kept import Kept, flat, nested, recall, remember
from flexlora.training.memory import Budget, group_size
from flexlora.training.models import Base

MOST_KNOWN = 10_000
"""Results of evaluations that are remembered: a client under an adapter each."""


class NothingFits(ValueError):
    """A client none of whose answers fits `max_length`."""


@dataclass(frozen=True)
class Prompting:
    """How text becomes tokens."""

    template: Template = "chat"
    max_length: int = 512
    train_on_prompt: bool = False
    system: str | None = None


@dataclass(frozen=True, eq=False)
class Embedded:
    """Trains and evaluates clients where they are asked for.

    Attributes:
        base: the frozen model they share.
        population: their text, seen and unseen.
        training: local settings.
        seed: of the run.
        prompting: template and length.
        on_step: called now and then while a group trains, for progress.
        kept: what clients keep between rounds, for methods that need it.
        replicas: of the base on further devices, each of which trains a group of its own.
    """

    base: Base
    population: Population
    training: LocalTraining = field(default_factory=LocalTraining)
    seed: int = 0
    prompting: Prompting = field(default_factory=Prompting)
    on_step: Callable[[Progress], None] | None = None
    kept: Kept = field(default_factory=dict)
    replicas: Sequence[Base] = ()
    _budgets: list[Budget] = field(default_factory=list, init=False)
    _reading: Lock = field(default_factory=Lock, init=False)
    _known: dict[tuple[object, ...], Scores] = field(default_factory=dict, init=False)

    def train(
        self, payloads: Sequence[Payload], clients: Mapping[str, Client]
    ) -> Iterator[Update | Refusal]:
        """Every client's local round, `group_size` at a time; updates as they are ready.

        A client none of whose answers fits `max_length` is reported as failed.
        """
        sent, jobs = {p.client: p for p in payloads}, list[Job]()
        for c, payload in sent.items():
            try:
                self.encoded(c, "train", limit=1)
            except NothingFits as error:
                yield Refusal(c, Reason.FAILED, str(error))
            else:
                load = partial(self.training_tokens, c)
                jobs.append(Job(clients[c], recall(self.kept, payload), load))
        for update in self._trained(jobs):
            yield remember(self.kept, sent[update.client], update)

    def _trained(self, jobs: Sequence[Job]) -> Iterator[Update]:
        settings, budgets = (self.training, self.seed, self.on_step), self.budgets
        if self.replicas:
            return train_on([self.base, *self.replicas], jobs, *settings, budgets)
        return train(self.base, jobs, *settings, budgets[0])

    @property
    def budgets(self) -> list[Budget]:
        """Tokens of one forward on each device, as they stand: halved where they were too many."""
        wanted, kept = self.training.tokens_per_forward, self.training.gradient_checkpointing
        if not self._budgets:
            self._budgets.extend(Budget.of(wanted, b, kept) for b in (self.base, *self.replicas))
        return self._budgets

    def sizes(self, payloads: Sequence[Payload]) -> dict[str, int]:
        """What `auto` stands for with such a cohort; saved, so that a resume is the same."""
        wanted, bases = self.training.group_size, (self.base, *self.replicas)
        budgets = {f"tokens_per_forward_{k}": b.tokens for k, b in enumerate(self.budgets, 1)}
        return {
            "group_size": min(group_size(wanted, base, payloads) for base in bases),
            "tokens_per_forward": self.budgets[0].tokens,
            **(budgets if self.replicas else {}),
        }

    def settled(self, sizes: Mapping[str, int]) -> Embedded:
        """The same engine with such sizes in place of `auto`."""
        group, tokens = sizes["group_size"], sizes["tokens_per_forward"]
        training = replace(self.training, group_size=group, tokens_per_forward=tokens)
        engine = replace(self, training=training)
        for k, budget in enumerate(engine.budgets, 1):
            budget.tokens = sizes.get(f"tokens_per_forward_{k}", tokens)
        return engine

    @property
    def memory(self) -> dict[str, Tensor]:
        """What clients keep, as named tensors: for a checkpoint."""
        return flat(self.kept)

    def restore(self, memory: Mapping[str, Tensor]) -> None:
        """Put back what :attr:`memory` gave."""
        self.kept.clear()
        self.kept.update(nested(memory))

    def training_tokens(self, client: str) -> list[Tokens]:
        """A client's training examples in token ids, without those whose answer is too long.

        Devices ask from threads of their own; loaders and tokenizers need not be made for that.
        """
        with self._reading:
            return self.encoded(client, "train")[1]

    def encoded(
        self, client: str, split: Split, limit: int | None = None
    ) -> tuple[list[Example], list[Tokens]]:
        """The examples of one split that fit, as text and as token ids.

        Raises:
            NothingFits: there are some, but none fits `max_length`.
        """
        p, kept, tokens = self.prompting, list[Example](), list[Tokens]()
        learn_prompt = p.train_on_prompt and split == "train"
        examples = self.population[client].load(split)
        for example in examples:
            if limit is not None and len(kept) == limit:
                break
            try:
                encoded = encode(
                    example, self.base.tokenizer, p.template, p.max_length, learn_prompt, p.system
                )
            except AnswerTooLong:
                continue
            kept.append(example)
            tokens.append(encoded)
        if examples and not kept:
            raise NothingFits(
                f"client {client!r}, split {split!r}: no answer of its {len(examples)} examples "
                f"fits max_length {p.max_length}. Raise max_length or leave the client out."
            )
        return kept, tokens

    def evaluate(
        self,
        views: Mapping[str, Adapter],
        patch: Mapping[str, Term] | None = None,
        split: Split = "test",
        metrics: Collection[Metric] = frozenset[Metric]({"loss"}),
        max_examples: int | None = None,
        max_generated: int | None = None,
        max_new_tokens: int = 64,
    ) -> dict[str, Scores]:
        """Score clients on one split, each under the view given for it (the base: `{}`).

        Clients that share a view must share the object. `max_examples` and `max_generated` bound
        the examples per client, the first ones, so that two evaluations see the same. What was
        asked before of the same adapter is remembered. A client none of whose answers fits
        `max_length` has no scores, and a warning names it.

        Raises:
            NothingFits: that is so of every client asked.
        """
        frozen = {module: (term,) for module, term in (patch or {}).items()}
        asked = (split, frozenset(metrics), max_examples, max_generated, max_new_tokens)
        patched = digest(patch or {})
        models = {id(view): digest(view) for view in views.values()}
        keys = {c: (c, models[id(view)], patched, *asked) for c, view in views.items()}
        exams, unfit = dict[str, Exam](), list[NothingFits]()
        for client, adapter in views.items():
            if keys[client] in self._known:
                continue
            try:
                examples, tokens = self.encoded(client, split, max_examples)
            except NothingFits as error:
                unfit.append(error)
                examples, tokens = [], []
            score = self.population[client].score
            exams[client] = Exam(adapter, examples, tokens, frozen, score, max_generated)
        if unfit and len(unfit) == len(views):
            raise unfit[0]
        for nothing in unfit:
            warnings.warn(f"Without scores: {nothing}", RuntimeWarning, stacklevel=2)
        budget = 2 * self.budgets[0].tokens  # nothing is kept for a backward
        found = scoring.evaluate(self.base, exams, metrics, budget, max_new_tokens)
        if len(self._known) > MOST_KNOWN:
            self._known.clear()
        scores = {c: found[c] if c in found else self._known[keys[c]] for c in views}
        self._known.update({keys[c]: scores[c] for c in found})
        return scores
