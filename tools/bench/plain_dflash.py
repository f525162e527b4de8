"""The published DFlash training step as in speculators: the baseline of `step.py --algorithm dflash`.

The samples of the pack form one row. Queries of all blocks read the row's keys and those of all blocks under a dense
mask, in torch's own attention: FlexAttention, which skips masked blocks, has no gradient on a CPU, so this is what the
trainer's other setting does there. The head is applied to every slot of every block, also to those that learn nothing
and the anchor's; the target's distribution is computed at every position of the row if there are as many slots, and
copied for each slot. Logits are kept for the backward pass.

SpecForge differs: it trains sample by sample, under a dense mask on a CPU as well, and learns tokens instead of
distributions. A pack of one sample (``--tokens 512 --mean-length 100000 --anchors 64``) is its attention.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from specbatch.drafts.block.anchors import anchors
from specbatch.drafts.block.model import BlockLayer, BlockModule
from specbatch.drafts.fused import rotate
from specbatch.drafts.masks import Masks
from specbatch.drafts.pack import PackTensors


def plain_step(draft: BlockModule, pack: PackTensors, states: list[tuple[Tensor, Tensor]], weights: Tensor) -> Tensor:
    """Forward and backward of a pack.

    Args:
        states: aux and last hidden states at every position of each sample.
        weights: float ``[K]``, weight of each term's summed divergence.

    Returns:
        the weighted loss.
    """
    settings, ids, device = draft.settings, pack.input_ids, pack.input_ids.device
    size, tokens = settings.shape.block_size, len(pack.input_ids)
    aux, last = (torch.cat(parts) for parts in zip(*states, strict=True))
    dtype, wide = draft.fc.weight.dtype, torch.promote_types(draft.fc.weight.dtype, torch.float32)
    masks = Masks(pack.loss_mask.cpu().numpy(), np.array(pack.lengths), pack.samples)
    anchor_A = torch.from_numpy(anchors(masks, settings.draw)).nonzero().flatten().to(device)
    mask, place = pack.loss_mask.to(device), torch.from_numpy(masks.position_N).to(device)
    document = torch.repeat_interleave(torch.arange(len(pack.lengths)), torch.tensor(pack.lengths)).to(device)
    context = draft.hidden_norm(draft.fc(aux.to(dtype)))
    token = torch.full((len(anchor_A), size), settings.mask_token_id, device=device)
    token[:, 0] = ids[anchor_A]
    x = F.embedding(token.flatten(), draft.embedding).to(dtype)
    slot = torch.arange(size, device=device)
    block = torch.arange(len(anchor_A), device=device).repeat_interleave(size)
    newest, row = anchor_A[block][:, None], torch.arange(tokens, device=device)
    sees = torch.cat([(row < newest) & (document == document[newest]), block[:, None] == block], 1)
    before = settings.rope.rotation(place, wide)
    own = settings.rope.rotation((place[anchor_A][:, None] + slot).flatten(), wide)
    for layer in draft.layers:
        x = _layer(layer, x, context, before, own, sees)
    label = anchor_A[:, None] + slot + 1 - settings.shape.first_slot
    inside = label.clamp(max=tokens - 1)
    same = (label < tokens) & (document[inside] == document[anchor_A][:, None])
    good = (same & mask[inside]).long().cumprod(1).bool()
    # The anchor's slot of a DFlash draft learns nothing.
    weight = F.pad(weights, (settings.shape.first_slot, 0))
    head = draft.target_head.to(dtype)
    with torch.no_grad():
        read = (inside - 1).flatten()
        if len(read) < tokens:
            p = F.linear(last[read].to(dtype), head).to(wide).softmax(-1)
        else:
            p = F.linear(last.to(dtype), head)[read].to(wide).softmax(-1)
    log_q = F.linear(draft.norm(x), head).to(wide).log_softmax(-1)
    divergence = F.kl_div(log_q, p, reduction="none").sum(-1).view_as(good)
    loss = (divergence * good * weight).sum()
    loss.backward()
    return loss.detach()


def _layer(
    layer: BlockLayer,
    x: Tensor,
    context: Tensor,
    before: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    sees: Tensor,
) -> Tensor:
    attention = layer.self_attn
    h = layer.input_layernorm(x)

    def heads(projection: torch.nn.Linear, of: Tensor) -> Tensor:
        return projection(of).unflatten(-1, (-1, attention.width))

    query = rotate(attention.q_norm(heads(attention.q_proj, h)), *own)
    key = torch.cat(
        [
            rotate(attention.k_norm(heads(attention.k_proj, of)), *rotation)
            for of, rotation in ((context, before), (h, own))
        ]
    )
    value = torch.cat([heads(attention.v_proj, context), heads(attention.v_proj, h)])
    mixed = F.scaled_dot_product_attention(
        *(each.transpose(0, 1)[None] for each in (query, key, value)), attn_mask=sees, enable_gqa=True
    )
    x = x + attention.o_proj(mixed[0].transpose(0, 1).flatten(1))
    return x + layer.mlp(layer.post_attention_layernorm(x))
