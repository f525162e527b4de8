"""Both implementations against dense attention, and against each other."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from specbatch.drafts.attention import OwnKeys, PrefixMask, cpu, gpu

HEADS, GROUPS, WIDTH = 4, 2, 16


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    own: list[OwnKeys]
    prefix_mask: PrefixMask

    @property
    def first(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and the first step's keys and values, without their history."""
        return self.q.detach(), self.k.detach(), self.v.detach()

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *(t for own in self.own for t in (own.key_MGD, own.value_MGD))]


def make_case(
    lengths: list[int], *, steps: int = 2, live: float = 0.4, seed: int = 0, dtype: torch.dtype = torch.float64,
    heads: int = HEADS, groups: int = GROUPS, width: int = WIDTH,
) -> Case:  # fmt: skip
    """Samples one after the other; of later steps' columns some have left the unroll already."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    total = sum(lengths)
    edges = torch.tensor([0, *lengths]).cumsum(0).tolist()
    at_step = (torch.rand(total, generator=generator) < live).nonzero().flatten()
    if not len(at_step):
        at_step = torch.tensor([total - 1])
    own, rows = [], at_step
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(steps):
        made.append((rows, random(len(rows), groups, width), random(len(rows), groups, width)))
        rows = rows[: max(1, len(rows) - 2)]
    for there, key, value in made:
        own.append(OwnKeys(key, value, None if len(there) == len(rows) else torch.searchsorted(there, rows)))
    return Case(
        random(len(rows), heads, width), random(total, groups, width), random(total, groups, width), own,
        PrefixMask(rows, tuple(pairwise(edges))),
    )  # fmt: skip


def dense_prefix(q: Tensor, k: Tensor, v: Tensor, prefix_mask: PrefixMask) -> tuple[Tensor, Tensor]:
    """Attention to the first step's keys, and its log-sum-exp, with a mask of queries times keys."""
    each = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
    score = torch.einsum("nhd,rhd->nhr", q, k) / math.sqrt(q.shape[-1])
    sees = torch.zeros(len(q), len(k), dtype=torch.bool)
    for n, row in enumerate(prefix_mask.row_N.tolist()):
        first = next(first for first, end in prefix_mask.samples if first <= row < end)
        sees[n, first : row + 1] = True
    score = score.masked_fill(~sees[:, None], float("-inf"))
    return torch.einsum("nhr,rhd->nhd", score.softmax(-1), v), score.logsumexp(-1)


def dense(case: Case) -> Tensor:
    """Compute attention with one softmax over all keys."""
    each = case.q.shape[1] // case.k.shape[1]
    out, lse = dense_prefix(case.q, case.k, case.v, case.prefix_mask)
    scores, values = [lse], [out]
    for own in case.own:
        index = slice(None) if own.index_N is None else own.index_N
        key, value = (t[index].repeat_interleave(each, 1) for t in (own.key_MGD, own.value_MGD))
        scores.append((case.q * key).sum(-1) / math.sqrt(case.q.shape[-1]))
        values.append(value)
    weight = torch.stack(scores).softmax(0)
    return (weight[..., None] * torch.stack(values)).sum(0)


def gradients(out: Tensor, case: Case) -> list[Tensor]:
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return list(torch.autograd.grad(out, case.leaves, towards.to(out.dtype), materialize_grads=True))


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@settings(max_examples=20, deadline=None)
@given(lengths=LENGTHS, steps=st.integers(0, 3), seed=st.integers(0, 99))
def test_blockwise_attention_and_its_gradients_are_those_of_dense_attention(lengths, steps, seed):
    case = make_case(lengths, steps=steps, seed=seed)
    out, expected = cpu.attend(case.q, case.k, case.v, case.own, case.prefix_mask), dense(case)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, case), gradients(expected, case))


@settings(max_examples=20, deadline=None)
@given(lengths=LENGTHS, steps=st.integers(1, 3), seed=st.integers(0, 99))
def test_merging_own_keys_by_log_sum_exp_is_one_softmax_gradients_included(lengths, steps, seed):
    case = make_case(lengths, steps=steps, seed=seed)
    out = gpu.attend(case.q, case.k, case.v, case.own, case.prefix_mask, prefix=dense_prefix)
    expected = dense(case)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, case), gradients(expected, case))


def test_without_the_gradient_of_the_log_sum_exp_the_merge_would_be_seen_to_be_wrong():
    case = make_case([30, 20])

    def cut(q: Tensor, k: Tensor, v: Tensor, prefix_mask: PrefixMask) -> tuple[Tensor, Tensor]:
        out, lse = dense_prefix(q, k, v, prefix_mask)
        return out, lse.detach()

    out = gpu.attend(case.q, case.k, case.v, case.own, case.prefix_mask, prefix=cut)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradients(out, case), gradients(dense(case), case))


def eager(q: Tensor, k: Tensor, v: Tensor, prefix_mask: PrefixMask) -> tuple[Tensor, Tensor]:
    """FlexAttention as it is written down."""
    return gpu.flex_prefix(q, k, v, prefix_mask, kernel=flex_attention)


@pytest.mark.parametrize("lengths", [[1], [700], [130, 1, 257, 128, 400]])
@pytest.mark.parametrize("live", [0.05, 0.4, 1.0])
def test_flex_attention_forward_is_blockwise_attention(lengths: list[int], live: float):
    case = make_case(lengths, live=live, dtype=torch.float32)
    with torch.no_grad():
        q, k, v = case.first
        own = [OwnKeys(step.key_MGD.detach(), step.value_MGD.detach(), step.index_N) for step in case.own]
        ours = cpu.attend(q, k, v, own, case.prefix_mask)
        theirs = gpu.attend(q, k, v, own, case.prefix_mask, prefix=eager)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("differentiable")
@pytest.mark.parametrize("lengths", [[1], [300, 128], [130, 1, 257]])
@pytest.mark.parametrize("live", [0.05, 0.4, 1.0])
def test_flex_attention_and_its_gradients_are_those_of_dense_attention(lengths: list[int], live: float):
    """The log-sum-exp's among them. What a GPU has of its own are the kernels."""
    case = make_case(lengths, live=live)
    out = gpu.attend(case.q, case.k, case.v, case.own, case.prefix_mask, prefix=eager)
    expected = dense(case)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, case), gradients(expected, case))


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=5), live=st.sampled_from([0.05, 0.5, 1.0]))
def test_the_block_mask_has_every_visible_block_and_calls_none_whole_that_is_not(lengths, live):
    prefix_mask = make_case(lengths, steps=0, live=live).prefix_mask
    keys = sum(lengths)
    mask = gpu.block_mask(prefix_mask, keys)
    sees = (prefix_mask.starts[:, None] <= torch.arange(keys)) & (torch.arange(keys) <= prefix_mask.row_N[:, None])
    size = gpu.BLOCK
    blocks = [[sees[n : n + size, r : r + size] for r in range(0, keys, size)] for n in range(0, len(sees), size)]
    for n, row in enumerate(blocks):
        partial = mask.kv_indices[0, 0, n, : mask.kv_num_blocks[0, 0, n]].tolist()
        whole = mask.full_kv_indices[0, 0, n, : mask.full_kv_num_blocks[0, 0, n]].tolist()
        assert not {*partial} & {*whole}
        for r, block in enumerate(row):
            assert block.any() <= (r in partial or r in whole)
            assert (r in whole) <= bool(block.all() and block.shape[1] == size)
    # The gradients of keys and values go by the same blocks, listed the other way round.
    assert listed(mask.q_num_blocks, mask.q_indices) == {(r, n) for n, r in listed(mask.kv_num_blocks, mask.kv_indices)}
    assert listed(mask.full_q_num_blocks, mask.full_q_indices) == {
        (r, n) for n, r in listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    }


def listed(count: Tensor, indices: Tensor) -> set[tuple[int, int]]:
    """Row and column of the blocks that such a table names."""
    return {(row, int(c)) for row, n in enumerate(count[0, 0].tolist()) for c in indices[0, 0, row, :n]}


SIZES = [[300, 500], [640, 200, 333], [1000], [150, 900, 20], [410, 411]]


@pytest.mark.usefixtures("differentiable")
@pytest.mark.parametrize("learns", [False, True])
def test_packs_of_all_sizes_share_one_compilation(learns: bool):
    """Tracing and guards, which are the same on a GPU. FlexAttention has no compiled log-sum-exp on a CPU."""
    torch._dynamo.reset()
    kernel = torch.compile(flex_attention, dynamic=True, backend="aot_eager")
    for number, lengths in enumerate(SIZES):
        case = make_case(lengths, steps=0, seed=number)
        if number == 1:
            assert counters["stats"]["unique_graphs"]
            counters.clear()  # the first pack compiles
        with torch.set_grad_enabled(learns):
            out, _ = gpu.flex_prefix(case.q, case.k, case.v, case.prefix_mask, kernel=kernel)
            expected = cpu.attend(case.q, case.k, case.v, [], case.prefix_mask)
        torch.testing.assert_close(out, expected)
        if learns:
            torch.testing.assert_close(gradients(out, case), gradients(expected, case))
    assert not counters["stats"]["unique_graphs"]


@pytest.mark.light
@pytest.mark.usefixtures("differentiable")
def test_no_kind_of_piece_is_left_uncompiled():
    """One query, one block of them, or many; as many keys; with gradients or without. torch compiles each apart, up to
    a limit, beyond which it would hold all scores."""
    torch._dynamo.reset()
    counters.clear()
    kernel = torch.compile(flex_attention, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for lengths, live, learns in itertools.product(([500], [100], [1]), (1.0, 0.5, 0.0), (True, False)):
            case = make_case(lengths, steps=0, live=live)
            with torch.set_grad_enabled(learns):
                out, _ = gpu.flex_prefix(case.q, case.k, case.v, case.prefix_mask, kernel=kernel)
                torch.testing.assert_close(out, cpu.attend(case.q, case.k, case.v, [], case.prefix_mask))
    assert torch._dynamo.config.recompile_limit > counters["stats"]["unique_graphs"] > 8


@pytest.mark.light
def test_compiled_flex_attention_forward_is_blockwise_attention():
    torch._dynamo.reset()
    kernel = torch.compile(flex_attention, dynamic=True)
    for number, lengths in enumerate(SIZES[:2]):
        case = make_case(lengths, steps=0, seed=number, dtype=torch.float32)
        q, k, v = (x.transpose(0, 1)[None] for x in case.first)
        with torch.no_grad():
            out = kernel(q, k, v, block_mask=gpu.block_mask(case.prefix_mask, k.shape[2]), enable_gqa=True)
        expected = cpu.attend(*case.first, [], case.prefix_mask)
        torch.testing.assert_close(out[0].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)
