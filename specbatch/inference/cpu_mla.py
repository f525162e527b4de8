"""Enables latent attention (DeepSeek's MLA) in SGLang on a machine without an accelerator.

SGLang expands the keys and values of a prefill if a backend has kernels for that, and assumes so for ``torch_native``;
but that backend reads the cache, which has the latent ones. The absorbed form, which projects queries into the latent
space instead, is correct there.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Make ``torch_native`` compute latent attention in its absorbed form; do nothing if there is an accelerator."""
    import torch

    if torch.accelerator.is_available():
        return
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    def absorbed(attention: Any, batch: Any) -> Any:
        return AttnForwardMethod.MLA

    AttentionBackendRegistry.register("torch_native", absorbed)
