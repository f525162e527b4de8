"""Whether packs fit ranks, and ranks their memory: checked before anything is started, without torch."""

from __future__ import annotations

from specbatch.config import Config
from specbatch.errors import UserError
from specbatch.target import TargetShape, aux_layers
from specbatch.training.memory import Shape, Work, default_columns_at_once, rank_bytes

RESERVE_BYTES = 1 << 30
"""Of a GPU's memory: CUDA's own, kernels, and what lies between blocks of the allocator."""


def check_ranks(config: Config) -> None:
    """Check that ranks can share the packs of a step.

    Raises:
        UserError: they can't.
    """
    training = config.training
    packs, ranks, together = training.packs_per_step, training.ranks, training.context_parallel
    if ranks % together:
        raise UserError(
            f"training.context_parallel: {together} does not divide training.ranks: {ranks}, and a rank trains all its "
            f"packs with the same others; try training.ranks: {(ranks // together + 1) * together}"
        )
    groups = ranks // together
    if packs % groups:
        near = (packs // groups * groups, (packs // groups + 1) * groups)
        shared = f", of which training.context_parallel: {together} train a pack together" if together > 1 else ""
        raise UserError(
            f"training.packs_per_step: {packs} can't be shared evenly by training.ranks: {ranks}{shared}; try "
            + " or ".join(str(count) for count in near if count)
        )


def check_memory(config: Config, shape: TargetShape) -> None:
    """Check that a rank's GPU has the memory that training takes, if it is known how much it has.

    Raises:
        UserError: it has not.
    """
    training = config.training
    if training.gpu_memory is None:
        return
    parts = trainer_memory(config, shape)
    needed = sum(parts.values())
    if needed <= training.gpu_memory - RESERVE_BYTES:
        return
    largest = ", ".join(f"{name} {_gib(part)}" for name, part in sorted(parts.items(), key=lambda x: -x[1])[:4])
    raise UserError(
        f"training.gpu_memory: {training.gpu_memory} less {_gib(RESERVE_BYTES)} for CUDA itself is less than the "
        f"{_gib(needed)} that a rank needs for a pack of nothing but loss tokens ({largest}); try "
        "training.recompute: all, a smaller training.columns_at_once or training.tokens_per_pack, more training.ranks, "
        "or training.context_parallel"
    )


def trainer_memory(config: Config, shape: TargetShape) -> dict[str, int]:
    """Bytes that a trainer rank needs on its GPU, by kind, for a full pack of nothing but loss tokens."""
    training, draft = config.training, config.draft
    return rank_bytes(
        draft_shape(config, shape),
        Work(
            tokens=training.tokens_per_pack,
            ttt_steps=draft.ttt_steps,
            columns_at_once=training.columns_at_once or default_columns_at_once(gpu=True),
            recompute=training.recompute,
            value_bytes=2 if training.dtype == "bfloat16" else 4,
            gpu=True,
            ranks_per_pack=training.context_parallel,
        ),
        ranks=training.ranks,
        stored_bytes=4 if shape.dtype == "float32" else 2,
    )


def draft_shape(config: Config, target: TargetShape) -> Shape:
    """Of the draft that the configuration asks for."""
    draft = config.draft
    return Shape(
        hidden=target.hidden,
        intermediate=draft.intermediate_size or target.intermediate,
        heads=target.heads,
        kv_heads=target.kv_heads,
        head_dim=target.head_dim,
        vocab=target.vocab,
        draft_vocab=min(draft.vocab_size or target.vocab, target.vocab),
        aux_layers=len(aux_layers(config, target)),
        own_embedding=draft.train_embedding,
        train_head=draft.train_head,
    )


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
