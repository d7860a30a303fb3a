import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.adapter import LoraSpec
from flexlora.federation.plans import NAMES, PAPER_TYPES, About, PowerLaw
from flexlora.federation.ranks import assign, count

IDS = [f"c{i:04}" for i in range(1000)]
SMALL = [4, 8, 16, 32]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("uniform", [250, 250, 250, 250]),
        ("heavy-tail-light", [800, 50, 50, 100]),
        ("heavy-tail-strong", [50, 50, 100, 800]),
        ("normal", [58, 442, 442, 58]),
        ("normal-as-released", [58, 57, 443, 442]),
        ("homogeneous", [1000]),
    ],
)
def test_the_papers_distributions(name, counts):
    found = list(count(assign(IDS, name, seed=0)).values())
    assert sum(found) == 1000
    assert all(abs(a - b) <= 1 for a, b in zip(found, counts, strict=True))


def test_the_papers_types_match_a_llama():
    spec = LoraSpec(PAPER_TYPES[2])
    layer = "model.layers.3."
    for name in "qkvo":
        assert spec.rank(f"{layer}self_attn.{name}_proj") == 30
    for name in ("gate", "up", "down"):
        assert spec.rank(f"{layer}mlp.{name}_proj") == 200
    assert spec.rank("transformer.h.0.attn.c_proj") == 30
    assert spec.rank("transformer.h.0.mlp.c_proj") == 200


@settings(deadline=None)
@given(
    st.sampled_from(["uniform", "heavy-tail-light", "heavy-tail-strong", "normal"]),
    st.integers(2, 60),
    st.integers(0, 5),
)
def test_counts_are_exact_and_the_largest_type_is_held(name, clients, seed):
    found = assign(IDS[:clients], name, seed, SMALL)
    assert list(found) == IDS[:clients]
    assert 32 in found.values()
    shares = {"uniform": 0.25, "heavy-tail-light": 0.1, "heavy-tail-strong": 0.8, "normal": 0.0575}
    held = list(found.values()).count(32)
    assert abs(held - shares[name] * clients) < 1 or held == 1


def test_who_gets_which_depends_on_the_seed_and_the_ids_alone():
    first = assign(IDS, "uniform", 0, SMALL)
    assert first == assign(IDS[::-1], "uniform", 0, SMALL)
    assert first != assign(IDS, "uniform", 1, SMALL)
    assert len(set(list(first.values())[:10])) > 1


def test_mixtures_numbers_lists_and_mappings():
    ids = IDS[:10]
    assert count(assign(ids, {8: 0.8, 32: 0.2}, 0)) == {"8": 8, "32": 2}
    assert assign(ids, 16, 0) == dict.fromkeys(ids, 16)
    assert list(assign(ids, list(range(1, 11)), 0).values()) == list(range(1, 11))
    explicit = {c: i + 1 for i, c in enumerate(ids)}
    assert assign(ids, explicit, 0) == explicit
    patterns = {"q_proj": 4, ".*": 8}
    assert assign(ids, patterns, 0) == dict.fromkeys(ids, patterns)
    assert assign(["12", "13"], {12: 4, 13: 8}, 0) == {"12": 4, "13": 8}
    mixed = [4, {"q_proj": 4, ".*": 8}]
    assert assign(ids[:2], mixed, 0) == dict(zip(ids, mixed, strict=False))


def test_normal_over_another_number_of_types_is_symmetric():
    low, middle, high = count(assign(IDS, "normal", 0, [2, 4, 8])).values()
    assert abs(low - high) <= 1
    assert middle == 581


def test_power_laws_span_their_ranks():
    wide = assign(IDS, PowerLaw(4, 64, exponent=1.0), 0)
    assert (min(wide.values()), max(wide.values())) == (4, 64)
    octaves = [sum(lo <= r < 2 * lo for r in wide.values()) for lo in (4, 8, 16, 32)]
    assert max(octaves) < 1.4 * min(octaves)
    steep = assign(IDS, "power-law", 0, SMALL)
    assert sum(steep.values()) < sum(wide.values())
    few = set(assign(IDS[:4], "log-uniform", 0, SMALL).values())
    assert len(few) == 4


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("heavy-tail-ligth", "did you mean 'heavy-tail-light'"),
        ({8: 0.8, 32: 0.3}, "sum to 1"),
        ({8: float("nan"), 32: 0.3}, "sum to 1"),
        ({"a": 0.5, 8: 0.5}, "whole numbers as ranks"),
        ({}, "empty"),
        ([4, 8], "list of 2 for 3 clients"),
        ({"c0000": 4, "c0001": 4}, "1 missing"),
        ({"c0000": 4, "c0001": 4, "c0002": 8, "c9": 8}, "1 unknown"),
        (0, "whole numbers from 1"),
        (True, "whole numbers from 1"),
        ([4, 8, -1], "whole numbers from 1"),
        (PowerLaw(8, 4), "low <= high"),
        ({7: 4}, "missing"),
    ],
)
def test_bad_plans_are_named(plan, said):
    with pytest.raises(ValueError, match=said):
        assign(IDS[:3], plan, 0)


def test_bad_types_and_ids_are_named():
    with pytest.raises(ValueError, match="defined for 4 types, got 2"):
        assign(IDS, "heavy-tail-light", 0, [4, 8])
    with pytest.raises(ValueError, match="small to large"):
        assign(IDS, "uniform", 0, [8, 4])
    with pytest.raises(ValueError, match="each once"):
        assign(["a", "a"], 4, 0)


def test_every_name_works():
    about = {c: About(10, "x") for c in IDS}
    for name in NAMES:
        assert len(assign(IDS, name, 0, about=about)) == 1000


def test_one_client_at_the_largest_rank():
    assert count(assign(IDS, "extreme-heavy-tail", 0, SMALL)) == {"4": 999, "32": 1}
    assert count(assign(IDS[:2], "extreme-heavy-tail", 0, SMALL)) == {"4": 1, "32": 1}


def test_alternatives_to_a_mixed_plan():
    mixed = assign(IDS, "heavy-tail-light", 3, SMALL)
    mean = assign(IDS, "mean-of-heavy-tail-light", 3, SMALL)
    assert set(mean.values()) == {round(sum(mixed.values()) / 1000)}
    assert set(assign(IDS, "highest-of-heavy-tail-light", 3, SMALL).values()) == {32}
    strong = assign(IDS, "strong-of-heavy-tail-light", 3, SMALL)
    assert strong == {c: r for c, r in mixed.items() if r > 4}
    assert assign(IDS, "strong-of-homogeneous", 3, SMALL) == dict.fromkeys(IDS, 4)
    with pytest.raises(ValueError, match="did you mean 'uniform'"):
        assign(IDS, "mean-of-unifrom", 0)


def test_ranks_that_follow_the_data():
    about = {c: About(i, f"k{i % 5}") for i, c in enumerate(IDS)}
    by_size = assign(IDS, "by-size", 0, SMALL, about)
    assert [by_size[IDS[i]] for i in (0, 250, 500, 999)] == SMALL
    by_category = assign(IDS, "by-category", 0, SMALL, about)
    for k in range(5):
        assert len({by_category[c] for c in IDS[k::5]}) == 1
    assert set(by_category.values()) == set(SMALL)
    with pytest.raises(ValueError, match="know every client's data"):
        assign(IDS, "by-size", 0, SMALL)
