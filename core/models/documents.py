"""Attention over rows packed end to end: each token sees the tokens before it in its own row, and no other row.

Registered with transformers as one more attention implementation, so that any model whose attention is its plain causal
one runs packed without a line of it changed. On a GPU the kernel is the variable-length flash attention inside torch
(arXiv 2307.08691); on a CPU the rows are walked one by one, which is the definition and wastes nothing.

Where rows begin and end comes with the batch, as a tensor made once on the CPU: asking a GPU for it in every layer would
stall the queue at each.
"""

import inspect
import itertools
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

SHORT = 512
"""Tokens of the longest row up to which rows have kernels of their own."""
DOCUMENTS = "strop_documents"
"""Name of the attention implementation, as `model.set_attn_implementation` takes it."""

try:  # torch 2.11 has it, its arguments grow with each version
    from torch.nn.attention.varlen import varlen_attn

    _VARLEN = frozenset(inspect.signature(varlen_attn).parameters)
except ImportError:
    _VARLEN = frozenset()


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, N, D], key and value [1, H_kv, N, D] -> [1, N, H, D]."""
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(f"{type(module).__name__} does not hand the bounds of packed rows to its attention")
    if dropout:
        raise ValueError("packed rows know no attention dropout")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu":
        return _row_by_row(query, key, value, cu_seq_lens_q.tolist(), scale), None
    # Under autocast rotary embeddings may leave queries and keys in fp32, and DoRA over 4-bit weights all three.
    narrow = torch.get_autocast_dtype("cuda") if value.dtype == torch.float32 else value.dtype
    # squeeze, whose way back is a view: an index would copy each gradient into zeros.
    q, k, v = (part.squeeze(0).transpose(0, 1).to(narrow) for part in (query, key, value))
    return _varlen(q, k, v, cu_seq_lens_q, max_length_q, scale)[None], None


def _row_by_row(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: list[int], scale: float) -> torch.Tensor:
    has_groups = query.shape[1] != key.shape[1]
    rows = [
        scaled_dot_product_attention(
            query[:, :, begin:end],
            key[:, :, begin:end],
            value[:, :, begin:end],
            is_causal=True,
            scale=scale,
            enable_gqa=has_groups,
        )
        for begin, end in itertools.pairwise(bounds)
    ]
    return torch.cat(rows, dim=2).transpose(1, 2)


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float) -> torch.Tensor:
    if longest <= SHORT and q.device.type == "cuda":
        from core.models.short_rows import attend_short_rows  # Triton comes with torch for a GPU, and with no other

        return attend_short_rows(q, k, v, bounds, longest, scale)
    has_groups = q.shape[1] != k.shape[1]
    if "scale" in _VARLEN and (not has_groups or "enable_gqa" in _VARLEN):
        options: dict[str, Any] = {"scale": scale}
        options |= {"window_size": (-1, 0)} if "window_size" in _VARLEN else {"is_causal": True}
        if has_groups:
            options["enable_gqa"] = True
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    operator = torch.ops.aten._flash_attention_forward  # what varlen_attn calls; it has always known grouped heads
    return operator(q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scale)[0]


AttentionInterface.register(DOCUMENTS, _attend)
