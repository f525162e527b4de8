"""Repairs SGLang's model classes when one of them is chosen for a target.

Mistral-3's class, which has a vision encoder, does not provide states of layers, but the language model inside does, so
the request is delegated. On a machine without an accelerator others are repaired, too: gpt-oss's layers have the dtype
of its config.json, whatever SGLang's arguments say; MiniMax-M2's norm of queries and keys has only GPU kernels; and
Llama-4 assumes that a kernel rotates queries and keys in place, that they are bfloat16, and that experts get states
times the router's weight.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from specbatch.drafts.sglang import CAPTURE_METHOD, DELEGATING

TARGET = "sglang.srt.model_loader.utils.get_model_architecture"


def register() -> None:
    """Install the hook that repairs each class before it is used."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, repair, HookType.AFTER)


def repair(chosen: tuple[type, str], model_config: Any) -> None:
    """Repair the class that SGLang has chosen, given with the name by which it was found."""
    kind, name = chosen
    if name in DELEGATING:
        setattr(kind, CAPTURE_METHOD, capture_within)
    if name in _ON_CPU and not torch.accelerator.is_available():
        _ON_CPU[name](model_config)


def capture_within(self: Any, layer_ids: list[int] | None = None) -> None:
    """Make the language model inside a model keep the states of layers."""
    getattr(self.language_model, CAPTURE_METHOD)(layer_ids)


def sums_of_squares(x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    """Return the sums of squares of each row of queries and keys, float32 ``[2, rows]``; replaces
    ``rms_sumsq_serial``."""
    return torch.stack([x.float().pow(2).sum(dim=-1) for x in (x1, x2)])


def normed(
    x1: torch.Tensor,
    x2: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    sum_sq: torch.Tensor,
    tp_world: int = 1,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys, normed over all heads of all ranks; replaces ``rms_apply_serial``."""
    first, second = (
        (x.float() * torch.rsqrt(total / (x.shape[1] * tp_world) + eps)[:, None] * w.float()).to(x.dtype)
        for x, w, total in ((x1, w1, sum_sq[0]), (x2, w2, sum_sq[1]))
    )
    return first, second


def attend(self: Any, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: Any) -> torch.Tensor:
    """Replace ``Llama4Attention.forward``, for every dtype."""
    qkv, _ = self.qkv_proj(hidden_states)
    query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
    if self.rotary_emb is not None:
        query, key = self.rotary_emb(positions, query, key)
    if self.qk_norm is not None:
        query, key = (self.qk_norm(x.reshape(-1, self.head_dim)).view(x.shape[0], -1) for x in (query, key))
    if self.attn_temperature_tuning and not self.use_rope:
        query = (query * self._get_attn_scale(positions)).to(query.dtype)
    output, _ = self.o_proj(self.attn(query, key, value, forward_batch))
    return output


def weigh_before(original: Callable[..., torch.Tensor], layer: Any, x: torch.Tensor, topk: Any, config: Any) -> Any:
    """Adapt SGLang's experts in plain PyTorch, which weight outputs, to a target that weights inputs."""
    if config.apply_router_weight_on_input:
        if topk.topk_weights.shape[1] != 1:
            raise NotImplementedError("on a CPU only a token's single expert can get states times their weight")
        x = (x * topk.topk_weights).to(x.dtype)
        topk = topk._replace(topk_weights=torch.ones_like(topk.topk_weights))
        config = dataclasses.replace(config, apply_router_weight_on_input=False)
    return original(layer, x, topk, config)


def _repair_gpt_oss(model_config: Any) -> None:
    model_config.hf_config.dtype = model_config.dtype


def _repair_minimax(model_config: Any) -> None:
    module: Any = sys.modules["sglang.srt.models.minimax_m2"]
    module.rms_sumsq_serial, module.rms_apply_serial = sums_of_squares, normed


def _repair_llama4(model_config: Any) -> None:
    module: Any = sys.modules["sglang.srt.models.llama4"]
    if module.Llama4Attention.forward is attend:
        return
    module.Llama4Attention.forward = attend
    from sglang.srt.layers.moe import fused_moe_native

    fused_moe_native.moe_forward_native = functools.partial(weigh_before, fused_moe_native.moe_forward_native)


_ON_CPU: dict[str, Callable[[Any], None]] = {
    "GptOssForCausalLM": _repair_gpt_oss,
    "MiniMaxM2ForCausalLM": _repair_minimax,
    "Llama4ForCausalLM": _repair_llama4,
    "Llama4ForConditionalGeneration": _repair_llama4,
}
