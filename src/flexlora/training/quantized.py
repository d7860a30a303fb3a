"""A base model held in 4 or 8 bits, by bitsandbytes: what must be there, and what is asked for."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from flexlora.training.models import ModelError


def quantization(bits: int | None, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Options of :func:`~flexlora.training.models.load_base` for a quantized base; none for None.

    4 bits are NF4, as in QLoRA (Dettmers et al., NeurIPS 2023, arXiv 2305.14314), multiplied in
    `dtype`; 8 bits are LLM.int8 (Dettmers et al., NeurIPS 2022, arXiv 2208.07339).

    Raises:
        ModelError: no GPU, or bitsandbytes is not installed.
    """
    if bits is None:
        return {}
    name = f"model.load_in_{bits}bit"
    if not (device.startswith(("cuda", "auto")) and torch.cuda.is_available()):
        raise ModelError(
            f"{name}: needs a GPU; the device is {device!r} and there is "
            f"{'one' if torch.cuda.is_available() else 'none'}. Leave it out: a CPU trains in "
            "bfloat16 or float32."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f'{name}: bitsandbytes is not installed. Install it: pip install "flexlora[quantized]".'
        )
    from transformers import BitsAndBytesConfig

    wanted = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": wanted}
