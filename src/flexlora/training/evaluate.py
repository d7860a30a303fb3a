"""Scores of many clients in one pass: each example under its own client's adapter.

Answer loss is teacher-forced cross-entropy in nats per answer token. ROUGE-L, exact match and a
task's own score are of greedily generated text, the prompt not included. The release's ROUGE-L, the
argmax at every position of prompt and answer with the truth before it, is offered under its own
name; it is comparable with nothing else.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import torch
from rouge_score.rouge_scorer import RougeScorer

from flexlora.adapter import Adapter
from flexlora.data.task import Example
from flexlora.data.templates import Tokens
from flexlora.federation.state import Term
from flexlora.lowrank import LowRank
from flexlora.training.bank import Bank
from flexlora.training.batch import Item, chunks, collate, label_count
from flexlora.training.generate import generate
from flexlora.training.models import Base

Metric = Literal["loss", "rouge_l", "exact_match", "score", "rouge_l_teacher_forced"]
Frozen = Mapping[str, tuple[Term, ...]]


@dataclass(frozen=True)
class Exam:
    """What one client is asked, and the model that answers for it.

    Clients that share a model must share the adapter *object*: each distinct one is held once.
    """

    adapter: Adapter
    examples: Sequence[Example]
    tokens: Sequence[Tokens]
    frozen: Frozen = field(default_factory=dict)
    score: Callable[[str, Example], float] | None = None
    generated: int | None = None


@dataclass(frozen=True)
class Answer:
    """One generated answer beside the reference."""

    example: Example
    generated: str


@dataclass(frozen=True)
class Scores:
    """Results of one client. What was not asked for, or cannot be computed, is absent.

    Attributes:
        values: metric -> mean over its examples (the loss: over its answer tokens).
        examples: how many the loss is over.
        answers: generated text, in the order of the examples.
    """

    values: Mapping[str, float]
    examples: int
    answers: tuple[Answer, ...] = ()


def evaluate(
    base: Base,
    exams: Mapping[str, Exam],
    metrics: Collection[Metric],
    tokens_per_forward: int = 4096,
    max_new_tokens: int = 64,
    slots: int = 16,
) -> dict[str, Scores]:
    """Score clients, `slots` distinct adapters at a time. Base and adapters stay unchanged.

    Cost: one forward over all examples for the loss, and for generated text one decoding step of a
    wide batch per token.
    """
    results: dict[str, Scores] = {}
    for group in _by_adapter(exams, slots):
        distinct = {(id(e.adapter), id(e.frozen)): e for e in group.values()}
        bank = Bank.holding(
            base.model,
            [e.adapter for e in distinct.values()],
            [e.frozen for e in distinct.values()],
        )
        place = {key: slot for slot, key in enumerate(distinct)}
        slot_of = {c: place[id(e.adapter), id(e.frozen)] for c, e in group.items()}
        with torch.inference_mode():
            results |= _score(
                base, bank, group, slot_of, metrics, tokens_per_forward, max_new_tokens
            )
    return {client: results[client] for client in exams}


def _by_adapter(exams: Mapping[str, Exam], slots: int) -> Iterable[dict[str, Exam]]:
    """Groups of clients with at most so many distinct adapters."""
    by_model: dict[tuple[int, int], dict[str, Exam]] = {}
    for client, exam in exams.items():
        by_model.setdefault((id(exam.adapter), id(exam.frozen)), {})[client] = exam
    models = list(by_model.values())
    for i in range(0, len(models), slots):
        yield {c: e for model in models[i : i + slots] for c, e in model.items()}


def _score(
    base: Base,
    bank: Bank,
    exams: Mapping[str, Exam],
    slot_of: Mapping[str, int],
    metrics: Collection[Metric],
    budget: int,
    max_new_tokens: int,
) -> dict[str, Scores]:
    values: dict[str, dict[str, float]] = {c: {} for c in exams}
    answers: dict[str, tuple[Answer, ...]] = dict.fromkeys(exams, ())
    if "loss" in metrics:
        sums = answer_losses(base, bank, exams, slot_of, budget)
        for c, (nll, labels) in sums.items():
            values[c]["loss"] = nll / labels
    if "rouge_l_teacher_forced" in metrics:
        for c, v in teacher_forced(base, bank, exams, slot_of, budget).items():
            values[c]["rouge_l_teacher_forced"] = v
    if {"rouge_l", "exact_match", "score"} & set(metrics):
        prompts = {c: [t.prompt for t in e.tokens[: e.generated]] for c, e in exams.items()}
        texts = generate(base, bank, prompts, slot_of, budget, max_new_tokens)
        for c, exam in exams.items():
            pairs = list(zip(exam.examples, texts[c], strict=False))
            answers[c] = tuple(Answer(e, t) for e, t in pairs)
            values[c] |= text_scores(pairs, metrics, exam.score)
    return {c: Scores(values[c], len(e.tokens), answers[c]) for c, e in exams.items()}


def answer_losses(
    base: Base, bank: Bank, exams: Mapping[str, Exam], slot_of: Mapping[str, int], budget: int
) -> dict[str, tuple[float, int]]:
    """Client -> (sum of cross-entropy in nats, labels)."""
    owners, items = _items(exams, slot_of)
    sums = torch.zeros(len(items), dtype=torch.float64)
    done = 0
    for chunk in chunks(items, budget):
        batch = collate(base, chunk)
        with bank.routed(batch.slots, batch.sizes):
            nll = batch.losses(base).double()
        places = batch.per_label(range(done, done + len(chunk)), torch.long)
        sums.index_add_(0, places.cpu(), nll.cpu())
        done += len(chunk)
    totals = {c: [0.0, 0] for c in exams}
    for client, (_, t), nll_sum in zip(owners, items, sums.tolist(), strict=True):
        totals[client][0] += nll_sum
        totals[client][1] += label_count(t)
    return {c: (nll, int(labels)) for c, (nll, labels) in totals.items() if labels}


def teacher_forced(
    base: Base, bank: Bank, exams: Mapping[str, Exam], slot_of: Mapping[str, int], budget: int
) -> dict[str, float]:
    """ROUGE-L of the argmax at every position, prompt included: the release's metric."""
    owners, items = _items(exams, slot_of)
    whole = [(slot, replace(t, labels_from=0)) for slot, t in items]
    scores: dict[str, list[float]] = {c: [] for c in exams}
    done = 0
    for chunk in chunks(whole, max(1, budget // 4)):
        batch = collate(base, chunk)
        with bank.routed(batch.slots, batch.sizes):
            guesses = batch.logits(base).argmax(-1)
        parts = (torch.split(x, batch.counts) for x in (batch.labels, guesses))
        pairs = zip(*parts, strict=True)
        for n, pair in zip(batch.order, pairs, strict=True):
            texts = (base.tokenizer.decode(x, skip_special_tokens=True) for x in pair)
            scores[owners[done + n]].append(rouge_l(*texts))
        done += len(chunk)
    return {c: sum(s) / len(s) for c, s in scores.items() if s}


def _items(exams: Mapping[str, Exam], slot_of: Mapping[str, int]) -> tuple[list[str], list[Item]]:
    """All examples by slot and text, so that those that begin alike meet, with their clients."""
    rows = [(slot_of[c], c, t) for c, exam in exams.items() for t in exam.tokens]
    rows.sort(key=lambda row: (row[0], row[2].ids))
    return [c for _, c, _ in rows], [(slot, t) for slot, _, t in rows]


def digest(terms: Mapping[str, Term]) -> str:
    """A name for what terms compute: hash of their modules, numbers and scalings."""
    found = hashlib.blake2b(digest_size=16)
    for module, term in terms.items():
        parts = (term.B, term.A) if isinstance(term, LowRank) else (term,)
        scaling = term.scaling if isinstance(term, LowRank) else 1.0
        found.update(f"{module} {[(*x.shape, x.dtype) for x in parts]} {scaling!r}".encode())
        for x in parts:
            found.update(x.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def text_scores(
    pairs: Sequence[tuple[Example, str]],
    metrics: Collection[Metric],
    score: Callable[[str, Example], float] | None = None,
) -> dict[str, float]:
    """Means over `(example, generated text)` of the metrics asked for."""
    kinds: dict[str, Callable[[Example, str], float]] = {
        "rouge_l": lambda e, t: rouge_l(e.output, t),
        "exact_match": lambda e, t: float(normalised(e.output) == normalised(t)),
    }
    if score is not None:
        kinds["score"] = lambda e, t: score(t, e)
    return {
        name: sum(f(e, t) for e, t in pairs) / len(pairs)
        for name, f in kinds.items()
        if name in metrics and pairs
    }


def rouge_l(reference: str, text: str) -> float:
    """F-measure of the longest common subsequence (Lin, 2004), stemmed, as rouge-score computes it.

    >>> rouge_l("the cat sat", "the cats sat down")
    0.8571428571428571
    """
    return float(_scorer().score(reference, text)["rougeL"].fmeasure)


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def normalised(text: str) -> str:
    """Lower case, without punctuation at either end of a word, one space between words.

    >>> normalised(" The  answer, is: 42. ")
    'the answer is 42'
    """
    words = (w.strip(string.punctuation) or w for w in re.split(r"\s+", text.strip().lower()))
    return " ".join(w for w in words if w)


def summary(scores: Mapping[str, Scores], weighted: bool = False) -> dict[str, float]:
    """Means over clients, each counting once, or by its number of examples."""
    names = {name for s in scores.values() for name in s.values}
    means = {}
    for name in sorted(names):
        rows = [(s.values[name], s.examples) for s in scores.values() if name in s.values]
        weights = [n if weighted else 1 for _, n in rows]
        means[name] = sum(v * w for (v, _), w in zip(rows, weights, strict=True)) / sum(weights)
    return means
