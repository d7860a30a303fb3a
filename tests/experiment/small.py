"""A run that takes about two seconds: four tasks of arithmetic on the tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

TASKS = ("double", "negate", "triple", "square", "halve", "repeat")


def write_data(path: Path, tasks=TASKS, rows: int = 8) -> Path:
    """One JSONL file with a task column; two of eight rows in each of eval and test."""
    splits = ["train"] * (rows - 4) + ["eval"] * 2 + ["test"] * 2
    lines = [
        {"client": t, "task": t, "category": t[:1], "split": split, "instruction": f"{t} it.",
         "input": f"{t} {i}", "output": f"{i * len(t)}"}
        for t in tasks for i, split in enumerate(splits)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(model: Path, data: Path, /, **sections) -> dict:
    """A configuration as plain data; sections are merged over it."""
    config = {
        "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
        "data": {"kind": "jsonl", "path": str(data), "unseen": {"clients": ["halve", "repeat"]}},
        "lora": {"r": {2: 0.75, 4: 0.25}, "target_modules": ["q_proj", "k_proj", "down_proj"]},
        "training": {"max_steps": 1, "learning_rate": 0.01, "per_device_train_batch_size": 2},
        "federation": {"rounds": 2, "clients_per_round": 2},
        "evaluation": {"every": 1, "max_new_tokens": 3, "max_generated": 1, "samples": 1},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    return config


def write_config(folder: Path, model: Path, /, **sections) -> Path:
    """The same as a YAML file, with its data beside it."""
    data = write_data(folder / "data.jsonl")
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(settings(model, data, **sections)))
    return path
