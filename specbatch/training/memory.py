"""How much memory a trainer rank needs, by formula. Without torch, so that `specbatch.training.budget` can ask before
anything is queued.

Each term is what the code holds at its peak: while a piece of live columns is differentiated, or, where that is more,
while the gradients of the whole draft are handed to the sharded optimizer. Only terms that grow with the model or the
pack are counted. Tests compare the part that is no optimizer's with measured peaks on a CPU, and with what tensors
occupy on a GPU, counted without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 64 << 20, 1 << 30
"""About what the logits of one chunk of target positions, and what is made of them, may occupy."""

CPU_BLOCK_SCORES = 1 << 21
"""Most attention scores that are held at once on a CPU, over all heads: 8 MiB of float32."""

WIDE = 4
"""Bytes of a float32."""

Recomputation = Literal["none", "all_but_attention", "all"]


@dataclass(frozen=True)
class Shape:
    """Of a draft and its target. Names are those of a Hugging Face configuration."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    """Rows of the target's embedding."""
    draft_vocab: int
    aux_layers: int = 3
    own_embedding: bool = False
    """Whether the draft trains an embedding, instead of reading the target's."""
    train_head: bool = True

    @property
    def first(self) -> int:
        """Parameters that only the first projection has."""
        return self.aux_layers * self.hidden**2

    @property
    def layer(self) -> int:
        """Parameters of the decoder layer."""
        attention = 2 * self.hidden * (self.heads + 2 * self.kv_heads) + self.heads * self.hidden
        return attention * self.head_dim + 3 * self.hidden * self.intermediate + 4 * self.hidden

    @property
    def head(self) -> int:
        """Parameters of the head."""
        return self.draft_vocab * self.hidden

    @property
    def embedding(self) -> int:
        """Values of an embedding, the target's or the draft's own."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.first + self.layer + self.head + (self.embedding if self.own_embedding else 0)

    @property
    def trained(self) -> int:
        """Parameters that have gradients and optimizer states."""
        return self.parameters - (0 if self.train_head else self.head)


@dataclass(frozen=True)
class Work:
    """How a pack is trained."""

    tokens: int
    """Of the pack; all of them may be columns and target positions."""
    ttt_steps: int
    columns_at_once: int
    recompute: Recomputation
    value_bytes: Literal[2, 4]
    """Of what the draft computes in."""
    gpu: bool
    ranks_per_pack: int = 1


def default_columns_at_once(*, gpu: bool) -> int:
    """Live columns whose activations are held at once: as few as keep the device busy."""
    return 2048 if gpu else 512


def position_bytes(vocab: int, hidden: int, steps: int, *, wide: int, value: int, factor: int) -> int:
    """What a target position takes while its loss is computed: the gradients of all its logits, and beside them what
    logits are made of, or what is made of their gradients.

    Args:
        wide, value, factor: bytes of a logit, of a weight, and of a logit's gradient where it is kept.
    """
    compared = 6 * wide * vocab + steps * hidden * value
    return vocab * steps * factor + max(compared, steps * hidden * _normalised(value, wide))


def chunk_positions(bytes_each: int, *, gpu: bool) -> int:
    """Target positions whose logits are held at once.

    Args:
        bytes_each: as `position_bytes` says.
    """
    return max(1, (GPU_CHUNK_BYTES if gpu else CPU_CHUNK_BYTES) // bytes_each)


def step_bytes(shape: Shape, work: Work) -> dict[str, int]:
    """What forward and backward of one pack hold beside the weights, by kind."""
    value, wide = work.value_bytes, WIDE
    # float32 is its own wide form; of bfloat16, norms keep a float32 copy.
    copy = wide if value < wide else 0
    columns = -(-work.tokens // work.ranks_per_pack)
    keys = 2 * shape.kv_heads * shape.head_dim
    piece = min(work.columns_at_once, columns)
    # A pack is on its way while another is trained; a CPU trains it where it lies.
    packs = (shape.aux_layers + 1) * shape.hidden * 2 * columns * (2 if work.gpu else 0)

    inputs = shape.hidden * (4 * value + copy + (wide if shape.own_embedding else 0))
    first = shape.hidden * value + keys * value
    if work.recompute != "all":
        first += inputs + (shape.aux_layers * shape.hidden * value if value != 2 else 0)
    shared = work.tokens * keys * wide + columns * shape.hidden * value
    if work.ranks_per_pack > 1:
        shared += 2 * work.tokens * keys * value

    finish = shape.hidden * (3 * value + copy) + 4 * shape.intermediate * value
    # A GPU keeps what FlexAttention gives, too, beside what becomes of it once own keys have joined.
    attention = (3 if work.gpu else 2) * (shape.heads * shape.head_dim * value + shape.heads * wide)
    always = 2 * shape.hidden * value + keys * value
    whole = inputs + finish + attention
    kept = {"none": whole, "all_but_attention": attention, "all": 0}[work.recompute] + always
    # Of the step that is being differentiated: what was computed again, and the gradients of its widest tensors.
    passing = 3 * shape.intermediate * value + (0 if work.recompute == "none" else whole)
    # Each step gives an embedding a gradient as large as itself: the sum, the next one and the next sum.
    own = shape.embedding if shape.own_embedding else 0
    inner, gradients = shape.layer + own, (shape.layer + 3 * own) * value
    differentiated = piece * passing + gradients + (0 if work.gpu else 4 * CPU_BLOCK_SCORES * wide)

    factor = value if work.gpu else wide
    each = position_bytes(shape.draft_vocab, shape.hidden, work.ttt_steps, wide=wide, value=value, factor=factor)
    logits = min(chunk_positions(each, gpu=work.gpu), piece + work.ttt_steps) * each
    if not work.gpu and value != wide:
        logits += shape.head * wide
    head = shape.head if shape.train_head else 0
    parts = {
        "first step": columns * first,
        "sums": shared + (inner + head) * wide,
        "piece": piece * work.ttt_steps * kept,
        # A piece is differentiated when its loss has been.
        "logits or gradients": max(logits, differentiated),
    }
    # Of all columns at once: the gradient of the first step's norms, when the sums are gradients already.
    last = columns * (shape.hidden * _normalised(value, wide) + keys * value) + gradients + head * value
    excess = max(0, last - sum(parts.values()))
    return {"pack": packs, **parts, **({"first step's gradient": excess} if excess else {})}


def _normalised(value: int, wide: int) -> int:
    """Bytes that a value of a norm's input takes while the norm is differentiated."""
    return 4 * value + (6 if value < wide else 5) * wide


def rank_bytes(shape: Shape, work: Work, *, ranks: int, stored_bytes: int) -> dict[str, int]:
    """What a rank holds in all, by kind.

    Args:
        ranks: over which weights, gradients and optimizer states are sharded.
        stored_bytes: of a value of the target's checkpoint, whose embedding and head every rank holds whole.
    """
    of_optimizer = WIDE * (shape.parameters + 3 * shape.trained) // ranks
    gathered = shape.parameters * work.value_bytes
    target = (shape.head + (0 if shape.own_embedding else shape.embedding)) * stored_bytes
    step = step_bytes(shape, work)
    # Reducing gradients: in the dtype of the computation, and in float32 on their way.
    reducing = shape.trained * (work.value_bytes + WIDE) + step["pack"]
    excess = max(0, reducing - sum(step.values()))
    return {
        "weights, gradients and optimizer": of_optimizer,
        "gathered weights": gathered,
        "target's embedding and head": target,
        **step,
        **({"reducing gradients": excess} if excess else {}),
    }
