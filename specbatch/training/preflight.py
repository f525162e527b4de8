"""Checks that packs can be shared by ranks and fit their memory: before anything is started, without torch."""

from __future__ import annotations

from specbatch.config import Config
from specbatch.config.rules import Bytes
from specbatch.drafts.base import Algorithm
from specbatch.errors import UserError
from specbatch.gpu_kinds import gpu
from specbatch.units import bytes_text

RESERVE_BYTES = 1 << 30
"""GPU memory reserved for CUDA's own use, kernels, and fragmentation of the allocator."""


def check_ranks(config: Config) -> None:
    """Check that ranks can share the packs of a step.

    Raises:
        UserError: they can't, with what to change.
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


def check_memory(config: Config, algorithm: Algorithm) -> None:
    """Check that a rank's GPU has the memory that training needs, if its size is known.

    Raises:
        UserError: it has too little.
    """
    training = config.training
    memory, key = training.gpu_memory, f"training.gpu_memory: {training.gpu_memory}"
    if memory is None and training.gpu:
        memory = Bytes(gpu(training.gpu, "training.gpu").memory_bytes)
        key = f"training.gpu: {training.gpu} has {memory}, which"
    if memory is None:
        return
    parts = algorithm.memory()
    needed = sum(parts.values())
    if needed <= memory - RESERVE_BYTES:
        return
    largest = ", ".join(f"{name} {bytes_text(part)}" for name, part in sorted(parts.items(), key=lambda x: -x[1])[:4])
    raise UserError(
        f"{key} less {bytes_text(RESERVE_BYTES)} for CUDA itself is less than the "
        f"{bytes_text(needed)} that a rank needs for a pack of nothing but loss tokens ({largest}); try "
        "training.recompute: all, a smaller training.columns_at_once or training.tokens_per_pack, more training.ranks, "
        "or training.context_parallel"
    )
