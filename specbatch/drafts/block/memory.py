"""The memory that a trainer rank needs for a block draft, by formula. Does not import torch, so that a plan can ask
before anything is queued.

Each part is the code's peak: while a chunk of blocks is differentiated, or, if that is more, while the gradients of the
whole draft are handed to the sharded optimizer. It does not grow with the number of anchors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from specbatch.drafts.memory import (
    CPU_BLOCK_SCORES,
    CPU_CHUNK_BYTES,
    GPU_CHUNK_BYTES,
    WIDE,
    DecoderShape,
    Recomputation,
    total_bytes,
)

if TYPE_CHECKING:
    from specbatch.config import Config


@dataclass(frozen=True)
class BlockShape(DecoderShape):
    """Shape of a draft and its target."""

    aux_layers: int
    """Number of target layers that are read."""
    layers: int
    block_size: int
    first_slot: int
    """The slot that proposes the first token: 1 for DFlash, 0 for DSpark."""
    markov_rank: int = 0
    confidence: bool = False

    @property
    def proposals(self) -> int:
        """Tokens that a block proposes."""
        return self.block_size - self.first_slot

    @property
    def first(self) -> int:
        """Number of weights of the projection of the target's states."""
        return self.aux_layers * self.hidden**2

    @property
    def keys(self) -> int:
        """Number of weights of a layer's key and value projections."""
        return 2 * self.hidden * self.key

    @property
    def others(self) -> int:
        """Number of weights of a layer's other matrices."""
        return 2 * self.hidden * self.query + 3 * self.hidden * self.intermediate

    @property
    def all_layers(self) -> int:
        """Number of parameters of all layers."""
        return self.layers * (self.keys + self.others + 2 * self.hidden + 2 * self.head_dim)

    @property
    def own_heads(self) -> int:
        """Number of parameters of the heads that DSpark adds to the target's."""
        sure = self.hidden + self.markov_rank + 1 if self.confidence else 0
        return 2 * self.vocab * self.markov_rank + sure

    @property
    def parameters(self) -> int:
        return self.first + 2 * self.hidden + self.all_layers + self.own_heads

    @property
    def head(self) -> int:
        """Number of weights of the target's head."""
        return self.vocab * self.hidden


@dataclass(frozen=True)
class BlockWork:
    """How a pack is trained."""

    tokens: int
    """Tokens of the pack; all of them may be rows of the target's states."""
    slots_at_once: int
    recompute: Recomputation
    value_bytes: int
    """Bytes of a value in the draft's compute dtype."""
    gpu: bool
    ranks_per_pack: int = 1


def default_slots_at_once(*, gpu: bool) -> int:
    """Return the number of slots whose activations are in memory at once: as few as keep the device busy."""
    return 2048 if gpu else 256


def slot_bytes(*, wide: int, factor: int, means: bool) -> int:
    """Return the bytes that a learning slot takes while its loss is computed, per token of the vocabulary.

    Args:
        wide, factor: bytes of a logit, and of its gradient if it is kept.
        means: whether `loss._by_means` is used, which makes no gradient of logits.
    """
    return wide if means or factor == wide else wide + factor


def position_bytes(*, wide: int, means: bool) -> int:
    """Return the same for a position that slots learn from: its distribution and, unless `loss._by_means` is used, the
    temporaries of comparing the logits of one slot with it."""
    return wide if means else 7 * wide


def step_bytes(shape: BlockShape, work: BlockWork) -> dict[str, int]:
    """Return the bytes that forward and backward of one pack need besides the weights, by kind."""
    value, wide = work.value_bytes, WIDE
    # Norms keep a float32 copy of bfloat16 inputs; float32 needs none.
    copy = wide if value < wide else 0
    rows = -(-work.tokens // work.ranks_per_pack)
    slots = max(work.slots_at_once, shape.block_size)
    # On a GPU one pack is copied while another is trained; a CPU trains it in place.
    packs = (shape.aux_layers + 1) * shape.hidden * 2 * rows * (2 if work.gpu else 0)

    norm = 2 * value + copy
    context = 2 * shape.layers * shape.key * value
    if work.recompute != "all":
        context += shape.layers * shape.key * norm + shape.hidden * (norm + value)
        context += shape.aux_layers * shape.hidden * value if value != 2 else 0
    shared = work.tokens * 2 * shape.layers * shape.key * wide
    if work.ranks_per_pack > 1:
        shared += 2 * work.tokens * 2 * shape.layers * shape.key * value

    project = shape.hidden * norm + (shape.query + shape.key) * norm + (shape.query + 2 * shape.key) * value
    finish = shape.hidden * (norm + value) + 4 * shape.intermediate * value
    attention = (3 if work.gpu else 1) * (shape.query * value + shape.heads * wide)
    always = shape.hidden * value + (2 * shape.key * value if work.recompute != "all" else 0)
    whole = project + finish + attention
    kept = {"none": whole, "all_but_attention": attention + shape.query * value, "all": 0}[work.recompute] + always
    passing = 3 * shape.intermediate * value + (0 if work.recompute == "none" else whole)
    # The gradient of one tensor at a time, which is added to the sums at once.
    gradient = max(shape.hidden * max(shape.intermediate, shape.query), work.tokens * shape.key) * value
    differentiated = slots * passing + gradient + (0 if work.gpu else 4 * CPU_BLOCK_SCORES * wide)

    # A CPU uses `loss._by_means`, unless there are heads besides the target's.
    means = not work.gpu and not shape.own_heads
    blocks = -(-slots // shape.block_size)
    of_slots = blocks * shape.proposals * slot_bytes(wide=wide, factor=value if work.gpu else wide, means=means)
    of_positions = (blocks + shape.proposals) * position_bytes(wide=wide, means=means)
    compared = min(GPU_CHUNK_BYTES if work.gpu else CPU_CHUNK_BYTES, shape.vocab * (of_slots + of_positions))
    return {
        "pack": packs,
        "keys and values": rows * context,
        "sums": shared + (shape.all_layers + shape.own_heads) * wide,
        "blocks": slots * shape.layers * kept,
        # The peak of a chunk's backward pass comes after that of its loss.
        "logits or gradients": max(compared, differentiated),
        "head": 0 if work.gpu else shape.head * wide,
    }


def rank_memory(config: Config, shape: BlockShape, target_dtype: str) -> dict[str, int]:
    """Return the bytes that a trainer rank needs on its GPU, by kind, for a full pack of only loss tokens."""
    training = config.training
    value = 2 if training.dtype == "bfloat16" else 4
    work = BlockWork(
        tokens=training.tokens_per_pack,
        slots_at_once=training.columns_at_once or default_slots_at_once(gpu=True),
        recompute=training.recompute,
        value_bytes=value,
        gpu=True,
        ranks_per_pack=training.context_parallel,
    )
    stored = 4 if target_dtype == "float32" else 2
    return total_bytes(
        step_bytes(shape, work),
        parameters=shape.parameters,
        trained=shape.parameters,
        target=shape.head * (2 * stored + (value if value != stored else 0)),
        value=value,
        ranks=training.ranks,
    )
