"""Predicts the memory of a step besides weights and packs, by the formulas of `specbatch.drafts`."""

from __future__ import annotations

from tools.bench import block_case, step_case


def predicted_bytes(case: step_case.Case | block_case.Case) -> int:
    """Return the bytes that a pack takes, besides itself and the weights."""
    parts = case.parts
    # Sums become gradients, but for that of the first projection, which is made apart.
    return sum(parts.values()) - parts["pack"] + case.shape.first * case.work.value_bytes
