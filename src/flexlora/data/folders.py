"""Folders of JSON files: the FlexLoRA release's layout and the natural-instructions repository.

Opening reads every file once, to count and to check; no text is kept. A task reads its own files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flexlora.adapter import stable_seed
from flexlora.data.settings import call, few
from flexlora.data.tables import existing, text_of
from flexlora.data.tabular import SPLITS, EmptyAnswers, Rows, Sharing, require_training, share
from flexlora.data.task import Example, Split, Task

RELEASE_FILES: dict[Split, str] = {
    "train": "local_training_{}.json",
    "eval": "local_eval_{}.json",
    "test": "local_test_{}.json",
}


def release_population(path: str | Path, empty_answers: EmptyAnswers = "error") -> dict[str, Task]:
    """The release's folder: `local_training_K.json`, `local_eval_K.json`, `local_test_K.json`.

    Each is a list of objects with `instruction`, `input`, `output` and `category`, as the loader of
    `alibaba/FederatedScope` (branch FlexLoRA, `llm/dataloader`) reads them; other keys are ignored,
    `input` and `category` may be missing, and so may the eval and test files.

    Raises:
        FileNotFoundError: no such folder, or no training file in it.
        ValueError: a file that is not such a list, an empty answer (unless dropped), a client
            without training examples.
    """
    folder = existing(path, "folder")
    found = (re.fullmatch(r"local_training_(\w+)\.json", file.name) for file in folder.iterdir())
    clients = sorted((match[1] for match in found if match), key=_numeric)
    if not clients:
        raise FileNotFoundError(
            f"data: {folder} has no local_training_K.json; it has "
            f"{few(sorted(file.name for file in folder.iterdir())) or 'nothing'}. Set data.path."
        )
    population = {}
    for client in clients:
        load = partial(_release_split, folder, client, empty_answers)
        sizes = {split: len(load(split)) for split in SPLITS}
        task, category = _release_labels(folder, client)
        population[client] = Task(client, task, category, sizes, load)
    return require_training(population, str(folder))


def _release_split(
    folder: Path, client: str, empty_answers: EmptyAnswers, split: Split
) -> list[Example]:
    path = folder / RELEASE_FILES[split].format(client)
    if not path.exists():
        return []
    examples = []
    for i, item in enumerate(_objects(read_json(path), path)):
        if "instruction" not in item or "output" not in item:
            raise ValueError(
                f"{path}, entry {i}: keys {few(item) or 'none'}; expected instruction and output."
            )
        instruction, text, output = (
            text_of(item.get(k)) for k in ("instruction", "input", "output")
        )
        if output.strip():
            examples.append(Example(instruction, text, output))
        elif empty_answers != "drop":
            raise ValueError(
                f"{path}, entry {i}: empty output; there is nothing to learn from it. "
                "Set data.empty_answers: drop to leave such entries out."
            )
    return examples


def _release_labels(folder: Path, client: str) -> tuple[str, str]:
    items = read_json(folder / RELEASE_FILES["train"].format(client))
    first = items[0] if items else {}
    return (
        text_of(first.get("task")) or client,
        text_of(first.get("category")) or "uncategorized",
    )


def repository_population(
    path: str | Path,
    fraction: float = 0.1,
    sharing: Mapping[str, object] | None = None,
    empty_answers: EmptyAnswers = "error",
) -> dict[str, Task]:
    """The repository `allenai/natural-instructions`: one client for each `tasks/*.json`.

    Of a task, `Definition` is the instruction, `Categories` the category, and each of `Instances`
    an input with a list of accepted outputs, the first of which is the answer. The defaults are the
    paper's: 10 % of each task, of which 80/10/10 train, eval and test.

    Args:
        path: a copy of the repository, or its `tasks` folder.
        fraction: of each task's instances that are used.
        sharing: settings of :class:`~flexlora.data.tabular.Sharing`; its seed also draws the
            fraction.
        empty_answers: `error`, or `drop` to leave such instances out.

    Raises:
        FileNotFoundError: no such folder, or no task files in it.
        ValueError: a file that is not a task, an empty answer (unless dropped), a task without
            training examples.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"data.fraction: {fraction}; expected above 0 and at most 1.")
    held = call(Sharing, sharing or {}, "data.sharing")
    folder = existing(path, "folder")
    files = sorted((folder / "tasks").glob("*.json")) or sorted(folder.glob("task*.json"))
    if not files:
        raise FileNotFoundError(
            f"data: {folder} has no tasks/*.json; expected a copy of "
            "github.com/allenai/natural-instructions. Set data.path."
        )
    population = {}
    for file in files:
        task, name = read_task(file), file.stem
        rows = chosen_rows(task["Instances"], file, fraction, held.seed, empty_answers)
        parts = share(rows, name, held)
        sizes = {split: len(part) for split, part in parts.items()}
        category = _joined(task["Categories"]) or "uncategorized"
        load = partial(_repository_split, file, parts)
        population[name] = Task(name, name, category, sizes, load)
    return require_training(population, str(folder))


def chosen_rows(
    instances: Sequence[Mapping[str, Any]],
    file: Path,
    fraction: float,
    seed: int,
    empty_answers: EmptyAnswers,
) -> Rows:
    """The instances a client gets: a seeded `fraction` of them, at least one, those with an answer.

    Raises:
        ValueError: one without an answer, unless they are dropped.
    """
    generator = np.random.default_rng(stable_seed(seed, "fraction", file.stem))
    count = max(1, round(len(instances) * fraction))
    rows: Rows = np.sort(generator.permutation(len(instances))[:count])
    blank = np.array([not _first(instances[row]["output"]).strip() for row in rows], dtype=bool)
    if blank.any() and empty_answers != "drop":
        raise ValueError(
            f"{file}: instances {few(rows[blank])} have an empty output; there is nothing to learn "
            "from them. Set data.empty_answers: drop to leave them out."
        )
    answered: Rows = rows[~blank]
    return answered


def read_task(file: Path) -> dict[str, Any]:
    """One task of the repository, with the keys that are used checked.

    Raises:
        ValueError: it is not one.
    """
    task = read_json(file)
    missing = [k for k in ("Definition", "Categories", "Instances") if k not in task]
    if not isinstance(task, dict) or missing:
        raise ValueError(
            f"{file}: no {', '.join(missing) or 'object'}; expected a natural-instructions task "
            "with Definition, Categories and Instances."
        )
    for i, instance in enumerate(_objects(task["Instances"], file)):
        if "input" not in instance or "output" not in instance:
            raise ValueError(f"{file}, instance {i}: expected input and output.")
    return task


def _repository_split(file: Path, parts: dict[Split, Rows], split: Split) -> list[Example]:
    task = read_task(file)
    instruction, instances = _joined(task["Definition"]), task["Instances"]
    return [
        Example(instruction, text_of(instances[row]["input"]), _first(instances[row]["output"]))
        for row in parts[split].tolist()
    ]


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: it is cut off or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}). The file may be cut off: fetch or write it again."
        ) from None


def _objects(value: object, path: Path) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{path}: expected a list of objects, found {type(value).__name__}.")
    return value


def _first(output: object) -> str:
    return text_of(output[0] if isinstance(output, list) and output else output or "")


def _joined(value: object) -> str:
    return "\n".join(map(text_of, value)) if isinstance(value, list) else text_of(value)


def _numeric(name: str) -> tuple[bool, int, str]:
    return not name.isdigit(), int(name) if name.isdigit() else 0, name
