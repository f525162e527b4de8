"""Adds what SGLang's DFlash worker lacks for greedy decoding on a machine without an accelerator.

The worker has plain PyTorch forms of almost everything. Attention over a block is `chain_drafting.attend_chain`, which
is not causal in the draft's layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from specbatch.inference.cpu_speculative import require_hooks

_checked = False


def forward_block(
    original: Callable[..., Any],
    self: Any,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: Any,
    input_embeds: torch.Tensor | None = None,
    get_embedding: bool = False,
    pp_proxy_tensors: Any = None,
) -> Any:
    """Wrap the draft's forward. SGLang passes embeddings in bfloat16 whatever the dtype of the weights; widening
    them is exact for a target that is stored in bfloat16.

    Raises:
        RuntimeError: a hook was not applied.
    """
    global _checked
    if not _checked:
        require_hooks()
        _checked = True
    if input_embeds is not None:
        input_embeds = input_embeds.to(self.norm.weight.dtype)
    return original(self, input_ids, positions, forward_batch, input_embeds, get_embedding, pp_proxy_tensors)
