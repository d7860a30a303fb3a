"""Fixtures for every room. Tests run on one thread: repeatable, and several workers share a CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)
# The same examples on every machine: a red test stays red until it is mended.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token a byte, with a chat template, eos and pad."""
    import tiny

    return tiny.tokenizer()


@pytest.fixture
def tiny_model():
    """A fresh random Llama, 2 layers of 64, float32, always the same weights."""
    import tiny

    return tiny.model()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model and tokenizer as a Hugging Face folder; read only."""
    import tiny

    return tiny.save(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def natural_instructions() -> Path:
    """The release's client partition, which the project never contains."""
    root = Path(__file__).resolve().parents[1]
    default = root.parent / "shared" / "data" / "natural-instructions-clients.parquet"
    path = Path(os.environ.get("FLEXLORA_NI", default))
    if not path.is_file():
        pytest.skip(f"needs the Natural Instructions partition: set FLEXLORA_NI ({path} is absent)")
    return path
