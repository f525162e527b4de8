"""Greedy EAGLE-3 with a chain of drafts in plain PyTorch, for parts that SGLang has only as GPU kernels.

With one candidate per position the tree of drafts is a chain: token ``i`` of a request's ``width`` tokens follows
token ``i - 1``, the first one is the last token that the target itself chose, and plain causal attention is all the
mask that verification needs. Each function has the parameters of the one that it replaces, and writes to the same
tensors. `specbatch.inference.cpu_speculative` puts them in place.

Shapes: ``requests`` in the batch, ``width`` = drafts + 1 rows of each in a verification, ``slots`` of the pool of keys
and values, ``max_context`` columns of SGLang's table from positions to slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from specbatch.inference.cpu_sinks import attention

BACKEND = "torch_native"


def slots_from(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, start: torch.Tensor, count: int
) -> torch.Tensor:
    """Return the slots of ``count`` positions of each request, from ``start`` on.

    Args:
        req_to_token: int32 ``[pool, max_context]``.
        req_pool_indices: int ``[requests]``, rows of it.
        start: int ``[requests]``, first position.

    Returns:
        int64 ``[requests * count]``.
    """
    positions = start.long()[:, None] + torch.arange(count)
    return req_to_token[req_pool_indices.long()[:, None], positions].reshape(-1).long()


def assign_draft_slots(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    topk: int,
    num_cols: int,
    positions: torch.Tensor | None = None,
    mrope: torch.Tensor | None = None,
) -> None:
    """Fill ``out_cache_loc`` with the slots of the next ``num_cols`` positions of each request.

    Stands for a Triton kernel. Positions are prepared there for CUDA only.
    """
    if positions is not None or mrope is not None:
        raise NotImplementedError("SGLang asked for draft positions, which it did not on a CPU so far")
    out_cache_loc.copy_(slots_from(req_to_token, req_pool_indices, seq_lens, topk * num_cols))


def verification_slots(
    *,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
    device: Any,
) -> torch.Tensor:
    """Return the slots of the ``draft_token_num`` rows that a verification writes, int64 ``[requests * width]``.

    SGLang gets it from a platform through `SRTPlatform.get_speculative_cache_locs_fn`.
    """
    return slots_from(req_to_token, req_pool_indices, start_offset, draft_token_num)


def assign_request_slots(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Enter newly allocated slots into ``req_to_token``, from ``start_offset`` to ``end_offset`` of each request.

    Stands for a Triton kernel.
    """
    first = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[first : first + end - start].to(req_to_token.dtype)
        first += end - start


def copy_slots(
    data_ptrs: torch.Tensor,
    strides: torch.Tensor,
    tgt_loc: torch.Tensor,
    src_loc: torch.Tensor,
    num_locs: int,
    num_locs_upper: int,
    kv_copy_config: dict[str, Any],
) -> None:
    """Do nothing: accepted drafts of a chain are already in place.

    Replaces the Triton kernel that moves the accepted path of a tree; the pool calls it once to warm it up, with equal
    places.
    """
    if not torch.equal(tgt_loc[:num_locs], src_loc[:num_locs]):
        raise NotImplementedError("keys and values of a chain never move")


def build_chain(
    parent_list: torch.Tensor,
    top_scores_index: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: Any,
) -> None:
    """Describe the chain as a tree: each node's position, row, child and sibling (none).

    Stands for a CUDA kernel. The mask is not changed, since the attention of `attend_chain` is causal itself.

    Args:
        seq_lens: int ``[requests]``, tokens whose keys are in the pool.
        positions: int64 ``[requests * width]``, filled.
        retrieve_index: int64 ``[requests, width]``, filled with rows of the flat batch.
        retrieve_next_token: int64 ``[requests, width]``, filled with the child's column, -1 for the last one.
        retrieve_next_sibling: int64 ``[requests, width]``, filled with -1.
    """
    if topk != 1:
        raise NotImplementedError(f"speculative_eagle_topk {topk}: only chains (1) can be drafted on a CPU")
    width = num_verify_tokens
    column = torch.arange(width)
    positions.view(-1, width).copy_(seq_lens.long()[:, None] + column)
    retrieve_index.copy_(torch.arange(seq_lens.numel())[:, None] * width + column)
    retrieve_next_token.copy_(torch.where(column + 1 < width, column + 1, -1).expand_as(retrieve_next_token))
    retrieve_next_sibling.fill_(-1)


def verify_chain(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
    topk: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accept the drafts before the first one that differs from the target's choice.

    Stands for a CUDA kernel.

    Args:
        predicts: int32 ``[requests * width]``, filled with the target's choice after each row.
        accept_index: int32 ``[requests, width]`` of -1, filled with the rows that are kept: the first one, which the
            target chose itself, and one for each accepted draft.
        accept_token_num: int32 ``[requests]``, filled with the number of accepted drafts.
        candidates: int ``[requests, width]``, the target's last token and the drafts.
        retrieve_index: int64 ``[requests, width]``, rows of the flat batch.
        target_predict: int64 ``[requests, width]``, the target's most likely token after each row.

    Returns:
        The three tensors that were filled.
    """
    correct = candidates[:, 1:] == target_predict[:, :-1]
    accepted = correct.long().cumprod(dim=1).sum(dim=1)
    kept = torch.arange(candidates.shape[1]) <= accepted[:, None]
    predicts[retrieve_index] = target_predict.to(predicts.dtype)
    accept_index.copy_(torch.where(kept, retrieve_index, -1))
    accept_token_num.copy_(accepted)
    return predicts, accept_index, accept_token_num


def last_accepted(
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    accept_stride: int,
    batch_size: int,
) -> None:
    """Fill ``bonus_tokens`` with the token that the target chose after the last accepted draft of each request.

    Stands for a Triton kernel.

    Args:
        accept_tokens: int32 ``[requests, accept_stride]``; only the first ``accept_lens`` of a row mean anything.
        accept_lens: int32 ``[requests]``, accepted drafts + 1.
        bonus_tokens: int32 ``[requests]``.
    """
    last = accept_lens.long()[:, None] - 1
    bonus_tokens.copy_(accept_tokens.view(batch_size, accept_stride).gather(1, last).squeeze(1))


def attend_chain(
    original: Callable[..., torch.Tensor],
    self: TorchNativeAttnBackend,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor | None,
    extend_seq_lens: torch.Tensor | None,
    encoder_lens: torch.Tensor | None = None,
    scaling: float | None = None,
    enable_gqa: bool = False,
    causal: bool = False,
    is_cross_attn: bool = False,
    sliding_window_size: int | None = None,
) -> torch.Tensor:
    """Attention of a verification: each request's ``width`` rows read its prefix and each other, causally. A draft of
    blocks reads them likewise, but not causally.

    Wraps SGLang's attention over prompts, which gets no prefix lengths in a verification. All requests are
    computed at once, those with shorter prefixes padded: threads that meet at every request of every layer would take
    most of the time where cores are shared.

    Args:
        query: ``[requests * width, heads, head_dim]``.
        output: the same, filled.
        k_cache: ``[slots, kv_heads, head_dim]``, the rows' own keys included; ``v_cache`` likewise.
        seq_lens: int ``[requests]``, tokens before the chain.
        causal: False in the layers of a block draft.
    """
    if extend_prefix_lens is not None:
        return original(
            self,
            query,
            output,
            k_cache,
            v_cache,
            req_to_token,
            req_pool_indices,
            seq_lens,
            extend_prefix_lens,
            extend_seq_lens,
            encoder_lens,
            scaling=scaling,
            enable_gqa=enable_gqa,
            causal=causal,
            is_cross_attn=is_cross_attn,
            sliding_window_size=sliding_window_size,
        )
    if encoder_lens is not None or is_cross_attn:
        raise NotImplementedError("only decoder targets can be verified on a CPU")
    width = query.shape[0] // seq_lens.shape[0]
    if sliding_window_size is None or sliding_window_size < 0:
        sliding_window_size = req_to_token.shape[1]
    elif not causal:
        raise NotImplementedError("layers of a block draft with a sliding window cannot run on a CPU")
    row = seq_lens.long()[:, None] + torch.arange(width)
    column = torch.arange(int(seq_lens.max()) + width)
    distance = row[:, :, None] - column
    # Rows of a block see each other in both directions.
    first_ahead = 0 if causal else 1 - width
    visible = (distance >= first_ahead) & (distance <= sliding_window_size) & (column <= row[:, -1:])[:, None]
    slots = req_to_token[req_pool_indices.long(), : column.numel()].long()
    # Past a request's end the table holds arbitrary values; invisible entries must still be numbers.
    slots = torch.where(column <= row[:, -1:], slots, slots[:, :1])
    mixed = attention(
        query.view(-1, width, *query.shape[1:]).transpose(1, 2),
        k_cache[slots].to(query.dtype).transpose(1, 2),
        v_cache[slots].to(query.dtype).transpose(1, 2),
        attn_mask=visible[:, None],
        scale=scaling,
        enable_gqa=enable_gqa,
    )
    return output.copy_(mixed.transpose(1, 2).reshape(output.shape))


class StepAttention(TorchNativeAttnBackend):
    """Attention of the draft's step ``step``, from 0: it reads the prefix and the chain's first ``step + 1`` tokens."""

    prefill_attention_backend_str = BACKEND
    decode_attention_backend_str = BACKEND

    def __init__(self, model_runner: Any, step: int) -> None:
        super().__init__(model_runner)
        self.step = step

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        *rest: Any,
        **options: Any,
    ) -> torch.Tensor:
        read = seq_lens + self.step + 1
        return super()._run_sdpa_forward_decode(
            query, output, k_cache, v_cache, req_to_token, req_pool_indices, read, *rest, **options
        )


class ChainAttention:
    """The draft's attention over a whole chain: one `StepAttention` for each forward of the draft after the first."""

    prefill_attention_backend_str = BACKEND
    decode_attention_backend_str = BACKEND

    def __init__(self, model_runner: Any, steps: int) -> None:
        self.attn_backends = [StepAttention(model_runner, step) for step in range(steps - 1)]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Do nothing; SGLang calls this before each chain."""


def create_chain_attention(original: Callable[..., Any], self: Any) -> ChainAttention | None:
    """Wrap the factory, which has no multi-step attention for the CPU's backend.

    Returns:
        None for a single step, which needs no forward after the first.
    """
    steps = self.speculative_num_steps
    return ChainAttention(self.draft_model_runner, steps) if steps > 1 else None


def create_extend_attention(original: Callable[..., Any], self: Any) -> TorchNativeAttnBackend:
    """Wrap the factory: the draft's forward over accepted tokens is the same as over a prompt."""
    backend = TorchNativeAttnBackend(self.draft_model_runner)
    backend.prefill_attention_backend_str = backend.decode_attention_backend_str = BACKEND
    return backend
