"""The shape of drafts, chunk sizes that bound their memory, and the memory that they take, by formula. Does not import
torch, so that a plan can ask before anything is queued."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Recomputation = Literal["none", "all_but_attention", "all"]
"""What a backward pass recomputes instead of keeping it from the forward pass."""

CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 64 << 20, 1 << 30
"""Approximate limit of the bytes of one chunk's logits and of tensors computed from them."""
CPU_UNROLLED_BYTES = 128 << 20
"""The same on a CPU for the logits of unrolled steps, each of which is a product of its own: larger ones are faster."""

CPU_BLOCK_SCORES = 1 << 20
"""Most attention scores in memory at once on a CPU, over all heads: 4 MiB of float32."""

WIDE = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class DecoderShape:
    """Shape of a draft's decoder layers and of its target."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    """Number of rows of the target's embedding and head."""

    @property
    def query(self) -> int:
        """Number of values of a row's queries."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Number of values of a row's keys."""
        return self.kv_heads * self.head_dim


def total_bytes(
    step: dict[str, int], *, parameters: int, trained: int, target: int, value: int, ranks: int
) -> dict[str, int]:
    """Return the bytes that a trainer rank needs in total, by kind.

    Args:
        step: the bytes of a step; ``pack`` among them.
        parameters, trained: number of the draft's parameters, and of those that have gradients and optimizer states.
        target: bytes of the target's embedding and head, which every rank has as a whole.
        value: bytes of a value in the draft's compute dtype.
        ranks: number of ranks over which weights, gradients and optimizer states are sharded.
    """
    # Reducing gradients takes them in the compute dtype, and in float32 for the communication.
    reducing = trained * (value + WIDE) + step["pack"]
    excess = max(0, reducing - sum(step.values()))
    return {
        "weights, gradients and optimizer": WIDE * (parameters + 3 * trained) // ranks,
        "gathered weights": parameters * value,
        "target's embedding and head": target,
        **step,
        **({"reducing gradients": excess} if excess else {}),
    }


def position_bytes(vocab: int, hidden: int, steps: int, *, wide: int, value: int, factor: int) -> int:
    """Return the bytes that a target position takes while its loss is computed: the logits of all unrolled steps or
    their gradients, and besides them the inputs of logits, or what is computed from the gradients.

    Args:
        wide, value, factor: bytes of a logit, of a weight, and of a logit's gradient if it is kept.
    """
    compared = 4 * wide * vocab + 2 * steps * hidden * value
    return vocab * steps * factor + max(compared, steps * hidden * normalised_bytes(value, wide))


def chunk_positions(bytes_each: int, *, gpu: bool) -> int:
    """Return the number of target positions whose logits are in memory at once.

    Args:
        bytes_each: bytes per position, from `position_bytes`.
    """
    return max(1, (GPU_CHUNK_BYTES if gpu else CPU_UNROLLED_BYTES) // bytes_each)


def normalised_bytes(value: int, wide: int) -> int:
    """Return the bytes that a value of a norm's input takes while the norm is differentiated."""
    return 4 * value + (6 if value < wide else 5) * wide
