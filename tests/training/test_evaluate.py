"""Scores of many clients at once are the scores of each alone, and of plain transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from bank_cases import base_of, trained_adapter

from flexlora.adapter import LoraSpec
from flexlora.data.task import Example, Task
from flexlora.engines.embedded import Embedded, NothingFits, Prompting
from flexlora.federation.admission import Refusal
from flexlora.federation.state import Client, Payload, Update
from flexlora.lowrank import LowRank
from flexlora.training import evaluate as scoring
from flexlora.training.client import LocalTraining
from flexlora.training.evaluate import Scores, normalised, summary

METRICS = ("loss", "rouge_l", "exact_match", "score", "rouge_l_teacher_forced")


def population() -> dict[str, Task]:
    tasks = {}
    for n, name in enumerate(("add", "echo", "count")):
        rows = [Example(f"{name} {i}", "x" * (i % 3), f"{i * (n + 1)}") for i in range(5)]
        sizes = {"train": 5, "eval": 0, "test": 5}
        tasks[name] = Task(
            name, name, "toy", sizes, lambda split, rows=rows: rows if split != "eval" else [],
            score=(lambda text, e: float(len(text))) if name == "add" else None,
        )  # fmt: skip
    return tasks


@pytest.fixture(scope="module")
def engine() -> Embedded:
    return Embedded(base_of(torch.float32), population(), prompting=Prompting(max_length=64))


def views(engine: Embedded) -> dict[str, dict[str, LowRank]]:
    shared = trained_adapter(engine.base, LoraSpec(3), seed=1)
    return {"add": shared, "echo": trained_adapter(engine.base, LoraSpec(2), 2), "count": shared}


def test_together_is_alone(engine: Embedded) -> None:
    chosen = views(engine)
    together = engine.evaluate(chosen, metrics=METRICS, max_new_tokens=6, max_generated=2)
    for client, view in chosen.items():
        alone = engine.evaluate({client: view}, metrics=METRICS, max_new_tokens=6, max_generated=2)
        assert alone[client].values == pytest.approx(together[client].values, abs=1e-5)
        texts = [[a.generated for a in s.answers] for s in (alone[client], together[client])]
        assert texts[0] == texts[1]
        assert len(texts[0]) == 2
    assert set(together["add"].values) == set(METRICS)
    assert "score" not in together["echo"].values


def test_the_base_scores_as_transformers_does(engine: Embedded) -> None:
    model = tiny.model()
    _, tokens = engine.encoded("add", "test")
    losses = []
    for t in tokens:
        labels = torch.tensor([[-100] * len(t.prompt) + list(t.answer)])
        losses += [model(torch.tensor([t.ids]), labels=labels).loss.item()] * len(t.answer)
    scores = engine.evaluate({"add": {}}, metrics=("loss", "rouge_l"), max_new_tokens=5)["add"]
    assert scores.values["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    prompt = torch.tensor([tokens[0].prompt])
    out = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    text = engine.base.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
    assert scores.answers[0].generated == text.strip()


def test_a_patch_is_part_of_the_base(engine: Embedded) -> None:
    module = "model.layers.1.self_attn.v_proj"
    D = LowRank(torch.randn(32, 2), torch.randn(2, 64), 0.2)
    as_view = engine.evaluate({"add": {module: D}})
    as_patch = engine.evaluate({"add": {}}, patch={module: D})
    dense = engine.evaluate({"add": {}}, patch={module: D.dense()})
    assert as_view["add"].values == pytest.approx(as_patch["add"].values)
    assert as_view["add"].values == pytest.approx(dense["add"].values)


def test_limits_are_the_first_examples(engine: Embedded) -> None:
    scores = engine.evaluate({"echo": {}}, metrics=("loss", "rouge_l"), max_examples=3)
    assert scores["echo"].examples == 3
    assert [a.example.instruction for a in scores["echo"].answers] == ["echo 0", "echo 1", "echo 2"]


def test_answers_that_cannot_fit_are_left_out_and_an_empty_client_says_so(
    engine: Embedded,
) -> None:
    rows = [Example("q", "", "a" * 80), Example("q", "", "ok")]
    sizes = {"train": 2, "eval": 0, "test": 0}
    tasks = {"long": Task("long", "long", "", sizes, lambda split: rows)}
    some = Embedded(engine.base, tasks, prompting=Prompting(max_length=64))
    assert [e.output for e in some.encoded("long", "train")[0]] == ["ok"]
    rows.pop()
    with pytest.raises(NothingFits, match="no answer of its 1 examples"):
        some.encoded("long", "train")


def test_a_client_none_of_whose_answers_fits_stops_nobody(engine: Embedded) -> None:
    """Its training is refused by itself; it has no scores, and a warning names it."""
    rows, sizes = [Example("q", "", "a" * 80)], {"train": 1, "eval": 0, "test": 1}
    tasks = {**population(), "long": Task("long", "long", "", sizes, lambda split: rows)}
    some = Embedded(
        engine.base, tasks, LocalTraining(max_steps=1), prompting=Prompting(max_length=64)
    )
    adapter = trained_adapter(engine.base, LoraSpec(2))
    clients = {c: Client(c, LoraSpec(2), 1) for c in ("add", "long")}
    payloads = [Payload(c, 1, engine.base.fingerprint, adapter) for c in clients]
    answers = {a.client: a for a in some.train(payloads, clients)}
    assert isinstance(answers["add"], Update)
    assert isinstance(answers["long"], Refusal)
    with pytest.warns(RuntimeWarning, match="'long'.*no answer"):
        scores = some.evaluate({"add": adapter, "long": adapter}, metrics=METRICS)
    assert scores["long"] == Scores({}, 0)
    assert "loss" in scores["add"].values


def test_summaries() -> None:
    scores = {"a": Scores({"loss": 1.0}, 1), "b": Scores({"loss": 3.0}, 3)}
    assert summary(scores) == {"loss": 2.0}
    assert summary(scores, weighted=True) == {"loss": 2.5}
    assert normalised("a - b") == "a - b"


def test_a_question_is_answered_once(engine: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same adapter by value is remembered; another one, or another question, is not."""
    asked = []
    score = scoring.evaluate

    def counted(base, exams, *rest):
        asked.append(sorted(exams))
        return score(base, exams, *rest)

    monkeypatch.setattr(scoring, "evaluate", counted)
    fresh = Embedded(engine.base, engine.population, prompting=engine.prompting)
    first = fresh.evaluate(views(engine))
    second = fresh.evaluate(views(engine))
    other = views(engine)
    module = next(iter(other["echo"]))
    other["echo"] = {**other["echo"], module: replace(other["echo"][module], scaling=0.5)}
    fresh.evaluate(other)
    fresh.evaluate(views(engine), max_examples=2)
    assert first == second
    assert asked == [["add", "count", "echo"], [], ["echo"], ["add", "count", "echo"]]
