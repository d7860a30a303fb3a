"""Attention within each of many sequences laid end to end: no padding anywhere else in the model.

A flat batch is one row `(1, T)` that holds the examples of all clients, positions restarted per
example. Linear layers, norms and the head see `T` real tokens. Only here are examples taken apart:
they are sorted into buckets of similar length, padded on the right to the longest of their bucket,
and given to `scaled_dot_product_attention` with `is_causal`. A query never sees what stands to its
right, so the padding needs no mask and changes nothing.

Transformers' attention interface hands extra keyword arguments down to the attention function, so
the layout travels with the call (`segments=`) and nothing is kept between calls. Without it the
function is transformers' own `sdpa`, which generation uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "flexlora"


@dataclass(frozen=True, eq=False)
class Segments:
    """How a flat row is cut into examples, bucketed for attention.

    Attributes:
        gather: per bucket `(examples, longest)`: position in the flat row of each padded slot
            (padding points at position 0).
        scatter: `(T,)`: where in the concatenated, flattened buckets each token's result stands.
        padded: slots in all buckets together, padding included.
    """

    gather: tuple[Int[Tensor, "examples longest"], ...]
    scatter: Int[Tensor, " tokens"]
    padded: int

    @classmethod
    def of(
        cls, rows: Sequence[Int[Tensor, " length"]], device: torch.device | str = "cpu"
    ) -> Segments:
        """Examples by the places of their tokens, bucketed so that padding stays below a quarter.

        >>> a, b, c = torch.arange(5), torch.arange(5, 7), torch.tensor([0, 1, 7, 8, 9, 10])
        >>> s = Segments.of([a, b, c])  # the first two tokens of c are those of a
        >>> [tuple(g.shape) for g in s.gather], s.padded
        ([(2, 6), (1, 2)], 14)
        """
        total = 1 + max(int(row[-1]) for row in rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        gather, scatter, offset = [], torch.empty(total, dtype=torch.long), 0
        while order:  # the longest example left, and all within three quarters of it
            longest = len(rows[order[-1]])
            first = next(j for j, i in enumerate(order) if len(rows[i]) >= 0.75 * longest)
            bucket, order = order[first:], order[:first]
            index = torch.zeros(len(bucket), longest, dtype=torch.long)
            for n, i in enumerate(bucket):
                index[n, : len(rows[i])] = rows[i]
                # A shared token is computed alike in every example; any of them will do.
                scatter[rows[i]] = torch.arange(len(rows[i])) + (offset + n * longest)
            gather.append(moved(index, device))
            offset += index.numel()
        return cls(tuple(gather), moved(scatter, device), offset)


def attend(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment; transformers' `sdpa` when there are none.

    Raises:
        NotImplementedError: a feature the flat path lacks (attention soft-capping, sinks).
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    for feature in ("softcap", "s_aux", "position_bias"):
        if options.get(feature) is not None:
            raise NotImplementedError(f"flat attention has no {feature}")
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    window, results = options.get("sliding_window"), []
    for index in segments.gather:
        length = index.shape[1]
        mask = None
        if window is not None and length > window:
            position = torch.arange(length, device=q.device)
            distance = position[:, None] - position[None, :]
            mask = (distance >= 0) & (distance < window)
        queries, keys, values = (x[index].transpose(1, 2) for x in (q, k, v))
        if q.dtype == torch.bfloat16 and q.device.type == "cpu":
            out = by_products(queries, keys, values, scaling, mask)
        else:
            out = scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        results.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(results)[segments.scatter][None], None


def by_products(
    query: Float[Tensor, "n heads length dim"],
    key: Float[Tensor, "n kv_heads length dim"],
    value: Float[Tensor, "n kv_heads length dim"],
    scaling: float | None,
    mask: Bool[Tensor, "length length"] | None,
) -> Float[Tensor, "n heads length dim"]:
    """Causal attention as two batched products, the query heads of one key folded into rows.

    For bfloat16 on a CPU, where torch's fused kernel takes 1.5 to 3.5 times as long (forward and
    backward, lengths 120 to 512). Scores are bfloat16, as in transformers' eager attention.
    """
    n, heads, length, dim = query.shape
    groups = key.shape[1]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril_()
    hidden = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    q = (query * (dim**-0.5 if scaling is None else scaling)).reshape(n * groups, -1, dim)
    k, v = key.reshape(n * groups, length, dim), value.reshape(n * groups, length, dim)
    scores = torch.bmm(q, k.mT).view(n * groups, -1, length, length) + hidden
    weights = torch.softmax(scores, -1).view(n * groups, -1, length)
    return torch.bmm(weights, v).view(n, heads, length, dim)


def enable(model: PreTrainedModel) -> bool:
    """Route a model's attention through :func:`attend`, and say whether flat batches work on it.

    Decided by trying: two sequences laid end to end must give the logits they give alone.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    device = next(model.parameters()).device
    # Spread over the vocabulary: the first ids are often control tokens with extreme activations.
    ids = (977 * torch.arange(3, 51)) % model.config.get_text_config().vocab_size
    rows = list(torch.split(torch.arange(48), [32, 16]))
    try:
        with torch.no_grad():
            flat = model(**flat_inputs(ids, rows, device), use_cache=False).logits[0]
            apart = [ids[row][None].to(device) for row in rows]
            alone = [model(x, use_cache=False).logits[0] for x in apart]
    except (NotImplementedError, TypeError, RuntimeError, ValueError):
        works = False
    else:
        error = (flat - torch.cat(alone)).float().norm() / flat.float().norm()
        works = bool(error < (1e-4 if flat.dtype in (torch.float32, torch.float64) else 0.1))
    if not works:
        model.set_attn_implementation(before)
    return works


def flat_inputs(
    ids: Int[Tensor, " tokens"],
    rows: Sequence[Int[Tensor, " length"]],
    device: torch.device | str,
) -> dict[str, Any]:
    """Keyword arguments of a causal model for examples laid end to end.

    Args:
        ids: the tokens, each once.
        rows: where each example's tokens stand in them.
        device: of the model.
    """
    positions = torch.empty_like(ids)
    for row in rows:
        positions[row] = torch.arange(len(row))
    return {
        "input_ids": moved(ids, device)[None],
        "position_ids": moved(positions, device)[None],
        # Four dimensions tell transformers that masking is taken care of; its content is unused.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "segments": Segments.of(rows, device),
    }


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """On a device; to a GPU without waiting for what it is doing."""
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
