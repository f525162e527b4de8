"""Runs SGLang on a machine without an accelerator, through its own extension point for platforms.

Every fused operation uses its plain PyTorch form. With an accelerator the platform is inactive, so an installed
specbatch changes nothing for SGLang there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities

from specbatch.drafts.sglang import CPU_ALGORITHMS
from specbatch.inference import cpu_speculative


def activate() -> str | None:
    """Entry point of the group ``sglang.srt.platforms``: the class to use, or None to stay inactive."""
    if torch.accelerator.is_available():
        return None
    return "specbatch.inference.platform.CpuPlatform"


class CpuPlatform(CpuSRTPlatform):
    """SGLang's CPU platform without the compiled kernels that its own CPU mode needs."""

    # An out-of-tree platform gets the plain forms; PlatformEnum.CPU would import sgl_kernel, which has no CPU build.
    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """Return whether SGLang may use an algorithm: EAGLE-3 and DFlash if the plugin that implements them is enabled,
        else none."""
        return algorithm in CPU_ALGORITHMS and cpu_speculative.selected()

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        """Return whether a draft may use a backend; called for DFlash's drafts."""
        return backend == cpu_speculative.BACKEND

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        return cpu_speculative.BACKEND

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        from specbatch.inference.chain_drafting import verification_slots

        return verification_slots
