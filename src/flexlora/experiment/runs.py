"""The run directory: what a run leaves behind, written so that a kill at any moment loses nothing.

config.yaml      the resolved configuration: `flexlora run` on it repeats the run
run.json         versions, command, base model and its fingerprint
metrics.jsonl    one object a line: evaluations, rounds
samples.json     answers before and after
checkpoints/     round-00007/ ...
adapters/        PEFT folders
summary.json     what `run --format json` ends with; its presence means the run is finished
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from flexlora.experiment.config import Config
from flexlora.experiment.errors import MODEL, RUN, Failure, blame
from flexlora.experiment.load import load_config

PACKAGES = ("flexlora", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")


def create(config: Config, name: str) -> Path:
    """Make the directory of a new run and write its configuration; never an existing one.

    Args:
        config: its `output_dir` is the directory; without one, `runs/<name>-<number>`.
        name: of the recipe.

    Raises:
        Failure: `output_dir` exists, or cannot be made.
    """
    with blame(RUN, f"output_dir {config.output_dir or 'runs'}"):
        if config.output_dir:
            folder = Path(config.output_dir)
            if folder.exists():
                raise Failure(
                    f"output_dir {folder} exists; a run is never overwritten. Choose another, "
                    f"leave it out for a fresh name, or go on with: flexlora resume {folder}",
                    RUN,
                )
            folder.mkdir(parents=True)
        else:
            folder = _fresh(Path("runs"), name)
        saved = plain(config.model_dump(exclude={"output_dir"}))  # its place is where it lies
        text = yaml.safe_dump(saved, sort_keys=False, allow_unicode=True)
        write(folder / "config.yaml", text)
    return folder


def plain(value: Any) -> Any:
    """Tuples as lists, for YAML; unlike JSON it keeps numbers as keys.

    >>> plain({"r": {8: 0.5}, "names": ("a",)})
    {'r': {8: 0.5}, 'names': ['a']}
    """
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _fresh(parent: Path, name: str) -> Path:
    number = 1
    while True:
        folder = parent / f"{name}-{number:03d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def open_run(folder: Path) -> Config:
    """The resolved configuration of an existing run.

    Raises:
        Failure: not a run directory.
    """
    if not (folder / "config.yaml").is_file():
        raise Failure(f"{folder} is not a run directory: it has no config.yaml.", RUN)
    return load_config(folder / "config.yaml")


def identify(folder: Path, base: str, fingerprint: str) -> None:
    """Write `run.json` for a new run; for an existing one, insist on the same base model.

    Raises:
        Failure: the base model is not the one the run was made with.
    """
    path = folder / "run.json"
    if path.exists():
        made = read(path)
        if made["fingerprint"] != fingerprint:
            raise Failure(
                f"{folder} was made with base model {made['base']!r}, fingerprint "
                f"{made['fingerprint']}; {base!r} has {fingerprint}. Restore that model, or start "
                "a new run.",
                MODEL,
            )
        return
    about = {
        "base": base,
        "fingerprint": fingerprint,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": dict(_versions()),
    }
    write(path, json.dumps(about, indent=2))


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


def read(path: Path) -> dict[str, Any]:
    """A JSON object from a run directory.

    Raises:
        Failure: unreadable.
    """
    with blame(RUN, str(path)):
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return value


def write(path: Path, text: str) -> None:
    """Replace a file's text in one step: a reader sees the old or the new, never a half.

    Raises:
        Failure: the disk is full or not writable.
    """
    scratch = path.with_name(f".{path.name}.writing")
    with blame(RUN, f"writing {path}"):
        scratch.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
        os.replace(scratch, path)


def append_metrics(folder: Path, kind: str, values: Mapping[str, Any]) -> None:
    """One line of `metrics.jsonl`.

    Raises:
        Failure: the disk is full or not writable.
    """
    path = folder / "metrics.jsonl"
    with blame(RUN, f"writing {path}"), path.open("a", encoding="utf-8") as out:
        out.write(json.dumps({"kind": kind, **values}) + "\n")
        out.flush()
        os.fsync(out.fileno())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every complete line of `metrics.jsonl`."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def metrics_size(folder: Path) -> int:
    """Bytes in `metrics.jsonl`."""
    path = folder / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def cut_metrics(folder: Path, size: int) -> None:
    """Forget lines written after a checkpoint: the rounds they tell of are run again."""
    path = folder / "metrics.jsonl"
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)
