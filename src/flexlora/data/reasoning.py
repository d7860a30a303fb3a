"""Procedural tasks of reasoning-gym: one family of problems is one client.

Stojanovski et al., *Reasoning Gym*, 2025, arXiv 2505.24760. Nothing is stored: a family's problems
are drawn from seeds when the client is first loaded, and scored by the family's own checker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from flexlora.adapter import stable_seed
from flexlora.data.settings import few, nearest
from flexlora.data.tabular import SPLITS
from flexlora.data.task import Example, Split, Task

FAMILIES = (
    "complex_arithmetic",
    "simple_equations",
    "base_conversion",
    "count_primes",
    "letter_counting",
    "spell_backward",
    "word_sequence_reversal",
    "basic_arithmetic",
    "calendar_arithmetic",
    "chain_sum",
    "count_bits",
    "decimal_arithmetic",
    "decimal_chain_sum",
    "fraction_simplification",
    "gcd",
    "lcm",
    "leg_counting",
    "prime_factorization",
    "products",
    "number_sequence",
    "family_relationships",
    "simple_geometry",
    "syllogism",
    "coin_flip",
)
"""Problems of under 250 characters on average, answers of a few words, made in under 1 ms each."""

IRREPRODUCIBLE = frozenset(
    {
        "isomorphic_strings",
        "list_functions",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    }
)
"""Draw from Python sets (0.1.25): the same seed gives other problems in another process."""

TRIES = 10
"""Problems drawn for each one wanted, before a family counts as exhausted."""


def reasoning_gym_population(
    families: Sequence[str] = FAMILIES,
    train: int = 128,
    eval: int = 16,
    test: int = 32,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Task]:
    """One client a family; opening it makes no problem.

    No problem is in two splits of a client: each split has its own seeds, and repeats are passed
    over.

    Args:
        families: names of reasoning-gym's data sets.
        train: examples of each client.
        eval: examples of each client.
        test: examples of each client.
        seed: of the problems.
        options: family -> settings of its own, for example `{"chain_sum": {"max_terms": 3}}`.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: an unknown or irreproducible family, wrong options, or no training examples.
    """
    if train < 1 or min(eval, test) < 0:
        raise ValueError(
            f"reasoning-gym: train {train}, eval {eval}, test {test}; expected at least 1, 0, 0."
        )
    if not families:
        raise ValueError("reasoning-gym: families is empty; name at least one, or leave it out.")
    sizes: dict[Split, int] = {"train": train, "eval": eval, "test": test}
    options = options or {}
    for family in options:
        if family not in families:
            raise ValueError(
                f"reasoning-gym: options for {family!r}, which is not among the families"
                f"{nearest(family, families)}."
            )
    return {
        family: family_task(family, options.get(family, {}), sizes, seed) for family in families
    }


def family_task(
    family: str, options: Mapping[str, Any], sizes: Mapping[Split, int], seed: int = 0
) -> Task:
    """One family as a client; its problems are made at the first `load` and then kept.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: an unknown or irreproducible family, or options that it refuses.
    """
    checker = _source(family, options, seed, 1)

    @cache
    def drawn() -> dict[Split, tuple[Example, ...]]:
        return draw(family, options, sizes, seed)

    def score(generated: str, example: Example) -> float:
        try:
            return float(checker.score_answer(answer=generated.strip(), entry=dict(example.meta)))
        except Exception:  # a checker that cannot parse an answer was not given a right one
            return 0.0

    return Task(family, family, checker.category, sizes, lambda split: drawn()[split], score)


def draw(
    family: str, options: Mapping[str, Any], sizes: Mapping[Split, int], seed: int
) -> dict[Split, tuple[Example, ...]]:
    """The problems of every split, none of them twice; those without an answer are passed over.

    Raises:
        ValueError: too few are left.
    """
    seen: set[str] = set()
    parts: dict[Split, tuple[Example, ...]] = {}
    for split in SPLITS:
        tries = TRIES * sizes[split]
        source = _source(family, options, stable_seed(seed, family, split), tries)
        examples: list[Example] = []
        for entry in map(source.__getitem__, range(tries)):
            if len(examples) == sizes[split]:
                break
            if entry["question"] in seen or not str(entry["answer"] or "").strip():
                continue
            seen.add(entry["question"])
            examples.append(Example(entry["question"], "", str(entry["answer"]), entry))
        if len(examples) < sizes[split]:
            raise ValueError(
                f"reasoning-gym {family!r}: only {len(examples)} new problems with an answer for "
                f"{split} among {tries} drawn, expected {sizes[split]}. Some families have few "
                "distinct problems, some a checker but no answer. Lower the sizes, widen its "
                "options, or choose another family."
            )
        parts[split] = tuple(examples)
    return parts


def _source(family: str, options: Mapping[str, Any], seed: int, size: int) -> Any:
    """A data set of reasoning-gym; making one makes no problem."""
    try:
        from reasoning_gym import create_dataset
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ImportError(
            'data: reasoning-gym is not installed: pip install "flexlora[demo]".'
        ) from None
    if family not in DATASETS:
        raise ValueError(
            f"reasoning-gym: unknown family {family!r}{nearest(family, DATASETS)}. "
            f"There are {len(DATASETS)}, for example {few(FAMILIES)}."
        )
    if family in IRREPRODUCIBLE:
        raise ValueError(
            f"reasoning-gym: {family!r} makes other problems in every process, whatever its seed; "
            "a run could not be repeated or resumed. Choose another family."
        )
    try:
        return create_dataset(family, seed=seed % 2**31, size=max(size, 1), **options)
    except (AssertionError, TypeError, ValueError) as error:  # how its configurations refuse
        raise ValueError(f"reasoning-gym {family!r}: options {dict(options)}: {error}") from None
