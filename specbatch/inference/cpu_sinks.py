"""Enables attention with sinks (gpt-oss's) in SGLang on a machine without an accelerator.

A sink is a learnt number of each head that takes part in the softmax like a key's score but does not contribute to the
output. SGLang's ``torch_native`` does not support them, so SGLang refuses gpt-oss there; and it refuses Gemma-4 because
of its windows, which are supported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

_sinks: ContextVar[torch.Tensor | None] = ContextVar("_sinks", default=None)
"""Sinks of the layer that is being computed, ``[heads]``."""


def register() -> None:
    """Make ``torch_native`` read sinks, and SGLang accept it."""
    from sglang.srt.arg_groups import model_hook
    from sglang.srt.layers.attention import torch_native_backend

    model_hook.attention_backends_of = accepted
    torch_native_backend.scaled_dot_product_attention = attention
    backend = torch_native_backend.TorchNativeAttnBackend
    for name in ("forward_extend", "forward_decode"):
        setattr(backend, name, _reading_sinks(getattr(backend, name)))


def accepted(view: Any) -> tuple[str, str]:
    """Return the prefill and decoding backends that pass SGLang's check of whether a target may use them."""
    return "triton", "triton"


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute PyTorch's attention with the sinks of the current layer.

    Args:
        query: ``[batch, heads, rows, width]``; ``key`` and ``value`` have ``columns`` instead of ``rows``.
        attn_mask: bool, True where a row sees a column; broadcastable to ``[batch, heads, rows, columns]``.
    """
    sinks = _sinks.get()
    if sinks is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    rows, columns = query.shape[2], key.shape[2]
    visible = torch.ones(rows, columns, dtype=torch.bool) if attn_mask is None else attn_mask
    if is_causal:
        visible = visible.tril()
    scores = torch.zeros(visible.shape, dtype=query.dtype).masked_fill(~visible, -torch.inf)
    scores = scores.expand(*query.shape[:3], columns)
    column = sinks.to(query.dtype)[:, None, None].expand(*query.shape[:3], 1)
    # The sink's key and value are zero, so its score is the sink itself.
    return scaled_dot_product_attention(
        query,
        pad(key, (0, 0, 0, 1)),
        pad(value, (0, 0, 0, 1)),
        attn_mask=torch.cat([scores, column], dim=-1),
        scale=scale,
        enable_gqa=enable_gqa,
    )


def _reading_sinks(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def forward(*args: Any, sinks: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        before = _sinks.set(sinks)
        try:
            return original(*args, **kwargs)
        finally:
            _sinks.reset(before)

    return forward
