"""Bytes that a computation holds at its peak, counted on tensors that have shapes and dtypes but no values.

On torch's meta device nothing is computed and no memory is taken, so that a step of any size can be counted on any
machine. What is counted is what tensors occupy: not what a CUDA context, kernels or an allocator's gaps take. Functions
that a GPU runs compiled are counted as written, with each value that they make in between: somewhat too much.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specbatch.training import blockwise, flex
from specbatch.training.attention import Own, Sight
from specbatch.training.memory import step_bytes
from tools.bench.step_case import make_case, predicted_bytes


def held(options: argparse.Namespace, *, own_embedding: bool = False) -> dict[str, float | str]:
    """Count what tensors occupy, where none has values.

    Args:
        own_embedding: as of `make_case`.
    """
    device, dtype = torch.device("meta"), getattr(torch, options.dtype or "bfloat16")
    case = make_case(options, device, dtype, own_embedding=own_embedding)
    draft, pack = case.draft, case.pack
    given = [*draft.parameters(), draft.draft_ids, draft.target_head, pack.input_ids, pack.aux, pack.last, case.weights]
    if draft.embedding is not None:
        given.append(draft.embedding)
    kept, blockwise.attend = blockwise.attend, attend
    try:
        with Held(device, given) as seen:
            draft(pack, case.weights)[0].sum().backward()
    finally:
        blockwise.attend = kept
    return {
        "shape": options.shape, "tokens": options.tokens, "loss_share": pack.loss_mask.float().mean().item(),
        "draft_vocab": case.shape.draft_vocab, "recompute": options.recompute,
        "dtype": str(dtype).removeprefix("torch."), "peak_bytes": seen.peak, "predicted_bytes": predicted_bytes(case),
        "pack_bytes": step_bytes(case.shape, case.work)["pack"],
    }  # fmt: skip


class Held(TorchDispatchMode):
    """Counts while it is entered.

    Args:
        device: whose tensors count.
        given: tensors that are there before, and do not count.
    """

    def __init__(self, device: torch.device, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device = device
        self._sizes: dict[int, int] = {}
        for tensor in given:
            self._hold(tensor, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Without values in it the sum is there already; torch 2.11 would take the dtype for `beta`.
        result = kwargs["out"] if func is torch.ops.aten.addmm.dtype_out else func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device.type:
                self._hold(tensor, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _hold(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name in self._sizes:
            return
        self._sizes[name] = size
        self.now += size
        weakref.finalize(storage, self._release, name)

    def _release(self, name: int) -> None:
        self.now -= self._sizes.pop(name)


def attend(q_NHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, own: Sequence[Own], sight: Sight) -> Tensor:
    """The attention of a GPU, as far as it occupies memory."""
    return flex.attend(q_NHD, k_RGD, v_RGD, own, sight, prefix=lambda q, k, v, _: Prefix.apply(q, k, v))


class Prefix(torch.autograd.Function):
    """What FlexAttention makes and keeps: the output, its log-sum-exp, and gradients; and no scores."""

    @staticmethod
    def forward(ctx, q_NHD: Tensor, k_RGD: Tensor, v_RGD: Tensor):
        out, lse = torch.empty_like(q_NHD), q_NHD.new_empty(q_NHD.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q_NHD, k_RGD, v_RGD, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHD: Tensor, grad_NH: Tensor):
        delta = torch.empty_like(grad_NH)
        gradients = tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])
        del delta
        return gradients
