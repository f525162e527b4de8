"""Repairs Gemma-3's class in SGLang, which provides a layer's last contribution instead of its output.

Each layer passes to the next its MLP's contribution and, separately, the residual stream; ``Gemma3TextModel`` keeps the
contribution alone, and on a GPU the next layer's norm then overwrites it. Hooks before the layers keep the sum, both
for capturing and for serving drafts, so that both agree with other engines.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

TARGET = "sglang.srt.models.gemma3_causal.Gemma3TextModel.forward"


def register() -> None:
    """Install the hook that repairs the class as soon as SGLang loads it."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, forward, HookType.AROUND)


def forward(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """The same as the model's own, except that the captured states are those of the residual stream."""
    kept: list[Any] = []

    def keep(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind_partial(*given, **named).arguments
        hidden, residual = bound["hidden_states"], bound.get("residual")
        kept.append(hidden.clone() if residual is None else hidden + residual)

    chosen = [layer for layer in model.layers_to_capture if layer < len(model.layers)]
    handles = [model.layers[layer].register_forward_pre_hook(keep, with_kwargs=True) for layer in chosen]
    try:
        result = original(model, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if not chosen:
        return result
    hidden, aux = result
    # The last layer's output, if it is captured too, comes last and is not repaired here.
    return hidden, [*kept, *aux[len(kept) :]]
