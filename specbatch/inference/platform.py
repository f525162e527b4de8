"""SGLang on a machine without an accelerator, through its own extension point for platforms.

Every fused operation takes its plain PyTorch form. Where there is an accelerator the platform stands aside, so an
installed specbatch changes nothing for SGLang there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities

from specbatch.inference import cpu_speculative


def activate() -> str | None:
    """Entry point of the group ``sglang.srt.platforms``: the class to use, or None to stand aside."""
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
        """EAGLE-3, where the plugin that makes it run is wanted; else SGLang says that it does not run here."""
        return algorithm == "EAGLE3" and cpu_speculative.selected()

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        from specbatch.inference.chain_drafting import verification_slots

        return verification_slots
