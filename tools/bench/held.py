"""Counts the peak bytes of a computation, on tensors that have shapes and dtypes but no values.

On torch's meta device nothing is computed and no memory is allocated, so a step of any size can be counted on any
machine. Only the size of tensors is counted, not a CUDA context, kernels or the allocator's fragmentation. Functions
that a GPU runs compiled are counted as written, including their intermediate values, which is somewhat too much.
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

from specbatch.drafts.attention import OwnKeys, PrefixMask, cpu, gpu
from tools.bench import block_case, step_case
from tools.bench.prediction import predicted_bytes


def held(options: argparse.Namespace, **switches: bool) -> dict[str, float | str]:
    """Count the bytes of tensors without values.

    Args:
        switches: as for `step_case.make_case`.
    """
    device, dtype = torch.device("meta"), getattr(torch, options.dtype or "bfloat16")
    make_case = block_case.make_case if options.algorithm == "dflash" else step_case.make_case
    case = make_case(options, device, dtype, **switches)
    return {
        "shape": options.shape, "tokens": options.tokens, "loss_share": case.pack.loss_mask.float().mean().item(),
        "draft_vocab": len(case.draft.target_head), "recompute": options.recompute,
        "dtype": str(dtype).removeprefix("torch."), "peak_bytes": step_peak(case, device),
        "predicted_bytes": predicted_bytes(case), "pack_bytes": case.parts["pack"],
    }  # fmt: skip


def step_peak(case: step_case.Case | block_case.Case, device: torch.device) -> int:
    """Return the peak bytes of a device's tensors in a step, besides weights and the pack."""
    draft, pack = case.draft, case.pack
    given = [
        *draft.parameters(), *draft.buffers(), draft.target_head, pack.input_ids, pack.loss_mask, *pack.rows.values(),
        case.weights, *(x for both in case.states for x in both),
    ]  # fmt: skip
    if draft.embedding is not None:
        given.append(draft.embedding)
    kept = cpu.attend
    if device.type == "meta":
        cpu.attend = attend
    try:
        with Held(device, given) as seen:
            draft(pack, case.weights)[0].sum().backward()
    finally:
        cpu.attend = kept
    return seen.peak


class Held(TorchDispatchMode):
    """Counts the bytes of tensors while it is entered.

    Args:
        device: device whose tensors count.
        given: existing tensors, which do not count.
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
        # Without values, `out` already is the sum; torch 2.11 would treat the dtype as `beta`.
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


def attend(q_NHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, own: Sequence[OwnKeys], sight: PrefixMask) -> Tensor:
    """Allocate the same tensors as attention on a GPU."""
    return gpu.attend(q_NHD, k_RGD, v_RGD, own, sight, prefix=lambda q, k, v, _: Prefix.apply(q, k, v))


class Prefix(torch.autograd.Function):
    """Allocates what FlexAttention keeps: output, log-sum-exp and gradients, but no scores."""

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
