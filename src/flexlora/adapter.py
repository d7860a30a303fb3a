"""Adapters: one product per module, what a client trains, and PEFT folders in and out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from flexlora.lowrank import LowRank, svd

Adapter = Mapping[str, LowRank]
"""Module path (as in `model.named_modules()`) -> product."""

Shapes = Mapping[str, tuple[int, int]]
"""Module path -> `(d_out, d_in)`."""

AlphaRule = Literal["fixed", "proportional", "rslora"]

REFERENCE_RANK = 8
"""`proportional` gives every rank the scaling that `fixed` gives this one, the paper's smallest."""


@dataclass(frozen=True)
class LoraSpec:
    """What one client trains: its rank in every module, and the scaling that goes with it.

    Attributes:
        r: one rank for all modules, or module pattern -> rank (first full or suffix match wins).
        lora_alpha: LoRA's alpha, not 0.
        alpha_rule: `fixed`: `scaling = alpha / r`, LoRA and the paper. `rslora`: `alpha / sqrt(r)`
            (Kalajdzievski, arXiv 2312.03732). `proportional`: `alpha / 8` at every rank, so that
            rank and step size are not confounded.

    >>> spec = LoraSpec({"q_proj": 4, ".*": 16}, lora_alpha=16)
    >>> spec.rank("model.layers.0.self_attn.q_proj"), spec.scaling("model.layers.0.mlp.up_proj")
    (4, 1.0)
    """

    r: int | Mapping[str, int]
    lora_alpha: float = 16.0
    alpha_rule: AlphaRule = "fixed"

    def __post_init__(self) -> None:
        ranks = [self.r] if isinstance(self.r, int) else list(self.r.values())
        if not ranks or min(ranks) < 1:
            raise ValueError(f"LoraSpec.r: {self.r}; every rank must be at least 1.")
        if not self.lora_alpha > 0:
            raise ValueError(f"LoraSpec.lora_alpha: {self.lora_alpha}; expected a number above 0.")

    def rank(self, module: str) -> int:
        """The rank at one module.

        Raises:
            KeyError: no pattern matches it.
        """
        if isinstance(self.r, int):
            return self.r
        for pattern, rank in self.r.items():
            if matches(pattern, module):
                return rank
        raise KeyError(f"LoraSpec.r: no pattern of {list(self.r)} matches module {module!r}.")

    def scaling(self, module: str) -> float:
        """The factor between `B @ A` and the update at one module."""
        if self.alpha_rule == "proportional":
            return self.lora_alpha / REFERENCE_RANK
        rank = self.rank(module)
        return self.lora_alpha / (rank**0.5 if self.alpha_rule == "rslora" else rank)


def matches(pattern: str, module: str) -> bool:
    """Whether a PEFT-style target names a module: its last parts, or a full regular expression.

    >>> matches("q_proj", "model.layers.0.self_attn.q_proj"), matches("proj", "a.q_proj")
    (True, False)
    """
    if module == pattern or module.endswith("." + pattern):
        return True
    return re.fullmatch(pattern, module) is not None


def select(modules: Iterable[str], targets: Iterable[str]) -> tuple[str, ...]:
    """The modules that any target names, in their own order.

    Raises:
        ValueError: a target that names nothing; the message lists the names there are.
    """
    modules, chosen = list(modules), set()
    for target in targets:
        hit = {m for m in modules if matches(target, m)}
        if not hit:
            known = sorted({m.rsplit(".", 1)[-1] for m in modules})
            raise ValueError(
                f"target_modules: {target!r} matches no linear layer of the model; it has {known}."
            )
        chosen |= hit
    return tuple(m for m in modules if m in chosen)


def initial_adapter(shapes: Shapes, ranks: Mapping[str, int], seed: int) -> dict[str, LowRank]:
    """PEFT's initial adapter: `A` Kaiming-uniform with `a = sqrt(5)`, `B` zero, scaling 1.

    Seeded per run and module, so that it does not depend on which other modules there are. Clients
    take prefixes of its rows.

    Raises:
        ValueError: a rank above `min(d_out, d_in)` of its module.
    """
    adapter = {}
    for module, (d_out, d_in) in shapes.items():
        rank = ranks[module]
        if rank > min(d_out, d_in):
            raise ValueError(
                f"rank {rank} at module {module!r} of shape ({d_out}, {d_in}): a rank is at most "
                f"min(d_out, d_in) = {min(d_out, d_in)}. Lower the rank or exclude the module."
            )
        generator = torch.Generator().manual_seed(stable_seed(seed, "initial A", module))
        bound = d_in**-0.5  # kaiming_uniform_(a=sqrt(5)): sqrt(6 / ((1 + 5) fan_in))
        A = (torch.rand(rank, d_in, generator=generator) * 2 - 1) * bound
        adapter[module] = LowRank(torch.zeros(d_out, rank), A)
    return adapter


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts: the same on every machine, run and Python.

    >>> stable_seed(1, "a") == stable_seed(1, "a") != stable_seed(1, "b")
    True
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def num_parameters(adapter: Adapter) -> int:
    """Numbers in the factors: `sum r (d_out + d_in)`."""
    return sum(d.B.numel() + d.A.numel() for d in adapter.values())


def to_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Flat tensors under PEFT's names, `<module>.lora_A.weight` and `<module>.lora_B.weight`."""
    flat = {}
    for module, d in adapter.items():
        flat[f"{module}.lora_A.weight"] = d.A.contiguous()
        flat[f"{module}.lora_B.weight"] = d.B.contiguous()
    return flat


def from_tensors(
    tensors: Mapping[str, torch.Tensor], scaling: Mapping[str, float]
) -> dict[str, LowRank]:
    """Inverse of :func:`to_tensors`; strict.

    Raises:
        ValueError: a missing or an extra tensor.
    """
    wanted = {f"{m}.lora_{x}.weight" for m in scaling for x in "AB"}
    if wanted != set(tensors):
        missing, extra = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
        raise ValueError(f"adapter tensors: missing {missing[:3]}, unexpected {extra[:3]}.")
    return {
        m: LowRank(tensors[f"{m}.lora_B.weight"], tensors[f"{m}.lora_A.weight"], s)
        for m, s in scaling.items()
    }


PEFT_PREFIX = "base_model.model."


def save_peft(
    adapter: Adapter, folder: Path, rank: int | None = None, base_model: str = "", seed: int = 0
) -> Path:
    """Write a PEFT folder of one uniform rank with all scalings folded in.

    `r = lora_alpha = rank`, no rsLoRA, no rank or alpha patterns: several servers of adapters
    ignore patterns silently. A product of higher rank is truncated by SVD, one of lower rank is
    padded with zero columns of `B`; so is a module too small for the rank that others need.

    Args:
        adapter: the products to write.
        folder: made if absent; existing adapter files are replaced.
        rank: of every module; by default the largest that a product in the adapter can have.
        base_model: written as `base_model_name_or_path`.
        seed: of the rows that pad a module of lower rank.

    Raises:
        ValueError: no module, or a rank above what any module's shape allows.
    """
    if not adapter:
        raise ValueError("save_peft: the adapter has no modules.")
    largest = max(min(d.shape) for d in adapter.values())
    rank = rank or min(max(d.rank for d in adapter.values()), largest)
    if rank > largest:
        raise ValueError(f"save_peft: rank {rank}; no module here can have more than {largest}.")
    uniform = {m: _at_rank(d, rank, seed) for m, d in adapter.items()}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PEFT_PREFIX + k: v.float() for k, v in to_tensors(uniform).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "target_modules": sorted(uniform),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _at_rank(d: LowRank, rank: int, seed: int) -> LowRank:
    """The best product of `rank` rows, zero ones beyond what the shape allows; scaling 1."""
    if d.rank == rank:
        return d.rescaled(1.0)
    best = svd(d, min(rank, *d.shape), seed)
    room = rank - best.rank
    pad = torch.nn.functional.pad
    return LowRank(pad(best.B, (0, room)), pad(best.A, (0, 0, 0, room))) if room else best


def load_peft(folder: Path) -> dict[str, LowRank]:
    """Read any plain LoRA folder of PEFT, with its rank and alpha patterns and rsLoRA.

    Raises:
        FileNotFoundError: a file is missing; names it.
        ValueError: something this package refuses (DoRA, `modules_to_save`, other PEFT types), or
            tensors that are not LoRA factors.
    """
    config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(
                f"PEFT adapter: {path} not found; expected a folder with "
                "adapter_config.json and adapter_model.safetensors."
            )
    config = json.loads(config_path.read_text())
    refuse_variants(config, folder)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(weights_path).items():
        found = re.fullmatch(
            rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight", key
        )
        if not found:
            raise ValueError(f"PEFT adapter {folder}: tensor {key!r} is not a LoRA factor.")
        factors.setdefault(found[1], {})[found[2]] = tensor
    adapter = {}
    for module, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"PEFT adapter {folder}: {module!r} has only lora_{next(iter(pair))}.")
        rank = pair["A"].shape[0]
        alpha = _pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        adapter[module] = LowRank(pair["B"].float(), pair["A"].float(), scaling)
    return adapter


def refuse_variants(config: Mapping[str, object], folder: Path) -> None:
    """Raise for LoRA variants that are not `W0 + scaling B A` on an unchanged base."""
    reasons = {
        "use_dora": "DoRA rescales the base weight, so its update is not a product",
        "modules_to_save": "full modules beside LoRA are outside the products that are averaged",
    }
    for key, reason in reasons.items():
        if config.get(key):
            raise ValueError(f"PEFT adapter {folder}: {key}={config[key]!r} is refused: {reason}.")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"PEFT adapter {folder}: peft_type {config.get('peft_type')!r}; expected 'LORA'."
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().split("_")[0] in {"pissa", "olora", "loftq", "corda"}:
        raise ValueError(
            f"PEFT adapter {folder}: init_lora_weights={init!r} is refused: it changes the base "
            "weights, which must be the same for every client."
        )


def _pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    return next((v for p, v in patterns.items() if matches(p, module)), default)
