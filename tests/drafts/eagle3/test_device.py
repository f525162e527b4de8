"""The step on a device that is not the host, as far as that can be tested without one.

Tensors on torch's meta device have shapes and dtypes but no values. So whatever asks the device for a value fails here,
and would have made the host wait for a GPU; and whatever takes another dtype or another way there than on a CPU has to
fit together.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specbatch.drafts.attention import OwnKeys, PrefixMask, cpu, gpu
from specbatch.drafts.eagle3.model import Eagle3Module
from specbatch.drafts.memory import Recomputation
from specbatch.drafts.pack import PackTensors
from tests.drafts.eagle3.test_model import WHOLE, make_draft, pack_of, reference
from tests.drafts.samples import WEIGHTS, difference, ours
from tests.drafts.test_attention import eager

STEPS = 3
HOST, DEVICE = torch.device("cpu"), torch.device("meta")


def away(draft: Eagle3Module, pack: PackTensors) -> tuple[Eagle3Module, PackTensors]:
    """Both in bfloat16 on a device without values; masks stay on the host."""
    assert draft.embedding is not None
    assert draft.target_head is not None
    table, head = (x.to("meta", torch.bfloat16) for x in (draft.embedding, draft.target_head))
    draft.to("meta", torch.bfloat16)
    draft.embedding, draft.target_head = table, head
    rows = {name: tensor.to("meta", torch.bfloat16) for name, tensor in pack.rows.items()}
    return draft, PackTensors(pack.input_ids.to("meta"), pack.loss_mask, pack.lengths, rows)


def prefix(q: Tensor, k: Tensor, v: Tensor, prefix_mask: PrefixMask) -> tuple[Tensor, Tensor]:
    """Compute what FlexAttention does with the same mask; it needs the device and rejects empty tensors."""
    assert len(q)
    assert len(k)
    each = q.shape[1] // k.shape[1]
    key = torch.arange(len(k), device=k.device)
    sees = (prefix_mask.starts[:, None] <= key) & (key <= prefix_mask.row_N[:, None])
    k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
    score = torch.einsum("nhd,rhd->nhr", q, k).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    score = score.masked_fill(~sees[:, None], float("-inf"))
    return torch.einsum("nhr,rhd->nhd", score.softmax(-1).to(q.dtype), v), score.logsumexp(-1)


@pytest.fixture
def gpus_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by log-sum-exp merging, as on a GPU."""

    def attend(q_NHD: Tensor, k_RGD: Tensor, v_RGD: Tensor, own: Sequence[OwnKeys], prefix_mask: PrefixMask) -> Tensor:
        return gpu.attend(q_NHD, k_RGD, v_RGD, own, prefix_mask, prefix=prefix)

    monkeypatch.setattr(cpu, "attend", attend)


@pytest.mark.usefixtures("gpus_way")
@pytest.mark.parametrize("recompute", get_args(Recomputation))
@pytest.mark.parametrize("norms", [False, True])
def test_a_step_asks_the_device_for_no_value_and_its_dtypes_fit(recompute: Recomputation, norms: bool) -> None:
    _, samples, _ = reference()
    draft, pack = away(make_draft(STEPS, WHOLE, fc_norm=norms, norm_output=norms), pack_of(samples))
    draft.recompute, draft.columns_at_once = recompute, 5
    result = draft(pack, WEIGHTS[:STEPS].float().to("meta"))
    result[0].sum().backward()
    assert (result.dtype, result.device.type) == (torch.float32, "meta")
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.dtype, parameter.grad.device.type) == (torch.bfloat16, "meta"), name


class Waited(TorchDispatchMode):
    """Copies from the host to the device for which the host waits until all work before them is done."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0
        self.waited: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and (args[0].device, result.device) == (HOST, DEVICE):
            self.copies += 1
            if not (kwargs or {}).get("non_blocking"):
                self.waited.append("".join(traceback.format_stack(limit=12)))
        return result


@pytest.mark.usefixtures("gpus_way")
def test_what_the_host_knows_is_copied_without_waiting() -> None:
    _, samples, _ = reference()
    draft, pack = away(make_draft(STEPS, WHOLE), pack_of(samples))
    draft.recompute, draft.columns_at_once = "all", 5
    weights = WEIGHTS[:STEPS].float().to("meta")
    with Waited() as seen:
        draft(pack, weights)[0].sum().backward()
        draft.evaluate(pack, weights)
    assert seen.copies > 20
    assert not seen.waited, seen.waited[0]


def test_a_step_that_asks_would_be_seen() -> None:
    """Attention as on a CPU looks at which rows it has."""
    _, samples, _ = reference()
    draft, pack = away(make_draft(STEPS, WHOLE), pack_of(samples))
    with pytest.raises(NotImplementedError, match="no data"):
        draft(pack, WEIGHTS[:STEPS].float().to("meta"))


@pytest.mark.usefixtures("differentiable")
@pytest.mark.parametrize("columns_at_once", [1, 5])
def test_the_gpus_way_gives_the_oracles_gradients(monkeypatch: pytest.MonkeyPatch, columns_at_once: int) -> None:
    """Uses FlexAttention's uncompiled form, one column at a time, so that none is left in the last steps."""
    monkeypatch.setattr(cpu, "attend", partial(gpu.attend, prefix=eager))
    draft, samples, expected = reference()
    draft.columns_at_once = columns_at_once
    assert difference(ours(draft, pack_of(samples), WEIGHTS[:STEPS])[1], expected) < 1e-9
