"""Unseen clients really unseen: components of shared text, and the measure of leakage."""

import pytest

from flexlora.data.shingles import components, shingles
from flexlora.data.splits import hold_out, leakage, text_components
from flexlora.data.task import Example, Task

LONG = "the quick brown fox jumps over the lazy dog today"


def client(id, train, test=(), category="x"):
    texts = {"train": train, "eval": (), "test": test}
    sizes = {split: len(t) for split, t in texts.items()}
    return Task(
        id, id, category, sizes, lambda split: [Example("Do.", t, "ok") for t in texts[split]]
    )


def population(*clients):
    return {task.id: task for task in clients}


SHARED = population(
    client("a", ["one", LONG]),
    client("b", ["two"], ["and so  THE quick brown fox\njumps over the lazy dog"], "y"),
    client("c", ["three", "four five"], category="y"),
    client("d", ["four five"], category="z"),
    client("e", ["five six"], category="z"),
)


def plain_shingles(texts, words):
    for i, text in enumerate(texts):
        split = text.lower().split()
        for j in range(len(split) - words + 1):
            yield i, tuple(split[j : j + words])


def test_shingles_are_the_runs_of_words():
    texts = ["a b c a b c", "", "B  c\ta b", "日本 語 の 文", "a"]
    expected = list(plain_shingles(texts, 3))
    hashes, owner = shingles(texts, 3)
    assert owner.tolist() == [i for i, _ in expected]
    runs = [run for _, run in expected]
    assert [[x == y for x in hashes] for y in hashes] == [[x == y for x in runs] for y in runs]


def test_components_follow_shared_runs_in_any_split_and_identical_short_texts():
    assert text_components(SHARED) == [("a", "b"), ("c", "d"), ("e",)]


def test_components_are_transitive_and_need_eight_words():
    words = LONG.split()
    seven = " ".join(words[:7])
    chain = [("a", [LONG + " x1"]), ("b", ["y " + LONG]), ("c", [seven + " z"]), ("d", [seven])]
    assert components(chain) == [("a", "b"), ("c",), ("d",)]
    assert components([]) == []


def test_component_hold_out_does_not_leak_where_client_hold_out_does():
    bad = leakage(SHARED, ["a", "c", "d", "e"], ["b"])
    assert (bad.shared, bad.identical, bad.sharing_examples) == (1.0, 0.0, 1)
    assert bad.worst == (("b", 0.5),)
    for seed in range(10):
        held = hold_out(SHARED, "component", count=2, seed=seed)
        assert {"a", "b"} <= set(held.seen) or {"a", "b"} <= set(held.unseen)
        found = leakage(SHARED, held.seen, held.unseen)
        assert found.sharing_examples == found.identical_examples == 0


def test_identical_inputs_are_counted_whatever_their_length():
    found = leakage(SHARED, ["a", "b", "c"], ["d", "e"])
    assert (found.identical, found.shared, found.identical_examples) == (0.5, 0.0, 1)
    assert "50.0% of clients have identical inputs" in str(found)
    assert "leakage of 2 unseen clients (2 examples)" in str(found)


def test_nobody_and_nothing_leak_nothing():
    assert leakage(SHARED, ["a"], []).shared == 0.0
    silent = {c: Task(c, c, "x", {"train": 1}, lambda split: [Example("", "", "ok")]) for c in "ab"}
    assert leakage(silent, ["a"], ["b"]).identical_examples == 0


def test_only_training_text_of_seen_clients_counts():
    assert leakage(SHARED, ["b"], ["a"]).sharing_examples == 0


def test_hold_out_by_client_is_a_function_of_the_seed():
    clients = population(*(client(str(i), ["t"]) for i in range(50)))
    one, same, other = (hold_out(clients, fraction=0.2, seed=s) for s in (1, 1, 2))
    assert one == same != other
    assert len(one.unseen) == 10
    assert sorted((*one.seen, *one.unseen), key=int) == list(clients)


def test_hold_out_listed_and_by_category():
    assert hold_out(SHARED, clients=["c"]).unseen == ("c",)
    assert hold_out(SHARED, "category", categories=["z"]).unseen == ("d", "e")
    drawn = hold_out(SHARED, "category", count=2)
    assert {SHARED[c].category for c in drawn.seen}.isdisjoint(
        SHARED[c].category for c in drawn.unseen
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected exactly one of"),
        ({"count": 1, "fraction": 0.5}, "expected exactly one of"),
        ({"by": "category", "clients": ["a"]}, "goes with `by`"),
        ({"clients": ["aa"]}, r"no client 'aa' \(did you mean 'a'\?\).*There are 5"),
        ({"by": "clients", "count": 1}, "'clients'; expected 'client', 'category' or 'component'"),
        ({"count": 5}, "5 of 5 clients are unseen"),
        ({"fraction": 0.01}, "0 of 5 clients are unseen"),
    ],
)
def test_impossible_hold_outs_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        hold_out(SHARED, **settings)
