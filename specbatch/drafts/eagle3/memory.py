"""The memory that a trainer rank needs for EAGLE-3, by formula.

Each term is the code's peak: while a chunk of live columns is differentiated, or, if that is more, while the gradients
of the whole draft are handed to the sharded optimizer. Only terms that grow with the model or the pack are counted.
Tests compare the part besides the optimizer with measured peaks on a CPU, and with the size of a GPU's tensors, which
are counted without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from specbatch.drafts.memory import (
    CPU_BLOCK_SCORES,
    WIDE,
    DecoderShape,
    Recomputation,
    chunk_positions,
    normalised_bytes,
    position_bytes,
    total_bytes,
)

if TYPE_CHECKING:
    from specbatch.config import Config


@dataclass(frozen=True)
class Shape(DecoderShape):
    """Shape of a draft and its target."""

    draft_vocab: int
    aux_layers: int = 3
    own_embedding: bool = False
    """Whether the draft trains an embedding, instead of reading the target's."""
    train_head: bool = True
    fc_norm: bool = False
    """Whether each of the target's layers is normalised separately."""
    norm_output: bool = False
    """Whether the unrolled state is normalised."""
    images: bool = False
    """Whether the target's embeddings are read from packs."""

    @property
    def first(self) -> int:
        """Number of parameters of the first projection."""
        return self.aux_layers * self.hidden**2

    @property
    def first_norms(self) -> int:
        """Number of parameters of the norms before it, if there are any."""
        return self.aux_layers * self.hidden if self.fc_norm else 0

    @property
    def layer(self) -> int:
        """Number of parameters of the decoder layer."""
        attention = 2 * self.hidden * (self.heads + 2 * self.kv_heads) + self.heads * self.hidden
        return attention * self.head_dim + 3 * self.hidden * self.intermediate + 4 * self.hidden

    @property
    def head(self) -> int:
        """Number of parameters of the head."""
        return self.draft_vocab * self.hidden

    @property
    def embedding(self) -> int:
        """Number of values of an embedding, the target's or the draft's own."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        embedding = self.embedding if self.own_embedding else 0
        return self.first + self.first_norms + self.layer + self.head + embedding

    @property
    def trained(self) -> int:
        """Number of parameters that have gradients and optimizer states."""
        return self.parameters - (0 if self.train_head else self.head)


@dataclass(frozen=True)
class StepWork:
    """How a pack is trained."""

    tokens: int
    """Tokens of the pack; all of them may be columns and target positions."""
    ttt_steps: int
    columns_at_once: int
    recompute: Recomputation
    value_bytes: Literal[2, 4]
    """Bytes of a value in the draft's compute dtype."""
    gpu: bool
    ranks_per_pack: int = 1


def default_columns_at_once(*, gpu: bool) -> int:
    """Return the number of live columns whose activations are in memory at once: as few as keep the device busy."""
    return 2048 if gpu else 1024


def step_bytes(shape: Shape, work: StepWork) -> dict[str, int]:
    """Return the bytes that forward and backward of one pack need besides the weights, by kind."""
    value, wide = work.value_bytes, WIDE
    # Norms keep a float32 copy of bfloat16 inputs; float32 needs none.
    copy = wide if value < wide else 0
    columns = -(-work.tokens // work.ranks_per_pack)
    keys = 2 * shape.key
    chunk = min(work.columns_at_once, columns)
    # On a GPU one pack is copied while another is trained; a CPU trains it in place.
    packs = (shape.aux_layers + 1 + shape.images) * shape.hidden * 2 * columns * (2 if work.gpu else 0)

    # The embedding and the state, before and after their norms' weights.
    embedded = shape.hidden * (2 * value + (wide if shape.own_embedding else 0))
    state = shape.hidden * (2 * value + copy)
    inputs = embedded + state
    first = shape.hidden * value + keys * value
    if work.recompute != "all":
        # Packs are bfloat16. Norms also keep the values before their weights are applied.
        read = 2 * value if shape.fc_norm else value if value != 2 else 0
        first += inputs + shape.aux_layers * shape.hidden * read
    shared = work.tokens * keys * wide + columns * shape.hidden * value
    if work.ranks_per_pack > 1:
        shared += 2 * work.tokens * keys * value

    finish = shape.hidden * (3 * value + copy) + 4 * shape.intermediate * value
    if shape.norm_output:
        finish += shape.hidden * (2 * value + copy)
    # A GPU keeps FlexAttention's output, besides the result after own keys were merged in.
    attention = (3 if work.gpu else 2) * (shape.query * value + shape.heads * wide)
    always = 2 * shape.hidden * value + keys * value
    whole = state + finish + attention
    kept = {"none": whole, "all_but_attention": attention, "all": 0}[work.recompute] + always
    # A chunk's tokens: the share of their embeddings in queries, keys and values, and its gradient.
    projected = (shape.query + 2 * shape.key) * value
    tokens = 2 * projected + (0 if work.recompute == "all" else embedded)
    # For the step that is being differentiated: recomputed activations, and the gradients of its widest tensors.
    passing = 3 * shape.intermediate * value + (0 if work.recompute == "none" else whole)
    # A chunk's gradient of an embedding is as large as the embedding.
    own = shape.embedding if shape.own_embedding else 0
    inner, gradients = shape.layer + own, (shape.layer + own) * value
    differentiated = chunk * passing + gradients + (0 if work.gpu else 4 * CPU_BLOCK_SCORES * wide)

    factor = value if work.gpu else wide
    each = position_bytes(shape.draft_vocab, shape.hidden, work.ttt_steps, wide=wide, value=value, factor=factor)
    logits = min(chunk_positions(each, gpu=work.gpu), chunk + work.ttt_steps) * each
    if not work.gpu and value != wide:
        logits += shape.head * wide
    head = shape.head if shape.train_head else 0
    parts = {
        "first step": columns * first,
        "sums": shared + (inner + head) * wide,
        "chunk": chunk * (work.ttt_steps * kept + tokens),
        # The peak of a chunk's backward pass comes after that of its loss.
        "logits or gradients": max(logits, differentiated),
    }
    # For all columns at once: the gradient of the first step's norms, when all sums of gradients are complete.
    last = columns * (shape.hidden * normalised_bytes(value, wide) + keys * value) + gradients + head * value
    excess = max(0, last - sum(parts.values()))
    return {"pack": packs, **parts, **({"first step's gradient": excess} if excess else {})}


def rank_bytes(shape: Shape, work: StepWork, *, ranks: int, stored_bytes: int) -> dict[str, int]:
    """Return the bytes that a rank needs in total, by kind.

    Args:
        ranks: number of ranks over which weights, gradients and optimizer states are sharded.
        stored_bytes: bytes of a value in the target's checkpoint.
    """
    return total_bytes(
        step_bytes(shape, work),
        parameters=shape.parameters,
        trained=shape.trained,
        target=(shape.head + (0 if shape.own_embedding else shape.embedding)) * stored_bytes,
        value=work.value_bytes,
        ranks=ranks,
    )


def rank_memory(config: Config, shape: Shape, ttt_steps: int, target_dtype: str) -> dict[str, int]:
    """Return the bytes that a trainer rank needs on its GPU, by kind, for a full pack of only loss tokens."""
    training = config.training
    work = StepWork(
        tokens=training.tokens_per_pack,
        ttt_steps=ttt_steps,
        columns_at_once=training.columns_at_once or default_columns_at_once(gpu=True),
        recompute=training.recompute,
        value_bytes=2 if training.dtype == "bfloat16" else 4,
        gpu=True,
        ranks_per_pack=training.context_parallel,
    )
    return rank_bytes(shape, work, ranks=training.ranks, stored_bytes=4 if target_dtype == "float32" else 2)
