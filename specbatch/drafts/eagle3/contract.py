"""What EAGLE-3 reads from the target, and the rule that derives the positions from a loss mask.

Draft column ``i`` of unrolled step ``k`` reads ``aux[i]`` and the token ``i + 1 + k``, and learns the target's
distribution at position ``i + 1 + k``, which is the distribution of token ``i + 2 + k`` (arXiv:2503.01840, §3). All
tokens from ``i + 1`` to that one have to be loss tokens: while decoding, drafting begins at a token that the target
chose, so a column that begins inside the prompt is never drafted. ``last`` is needed at each loss token that is
followed by another one, and ``aux`` up to the last column that learns anything.

Other trainers let columns of the prompt learn the first tokens of the answer, ``K (K + 1) / 2`` pairs per turn. On the
quickstart's data, with a third of its steps, the same seed and three tokens drafted at a time, the acceptance length
along the states of twelve held-out packs is 1.614 with these pairs and 1.621 without them, which is within its noise.

Servers give a draft the target's embeddings of images instead of those of the tokens that stand for them. If there are
images, column ``i`` reads ``embeds[i]`` in the first unrolled step: the target's embedding at position ``i + 1``. Later
steps read loss tokens only, which are never parts of images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from specbatch.drafts.base import TensorSpec
from specbatch.drafts.layers_and_last import LayersAndLast
from specbatch.drafts.masks import Masks

LEAST_LAYERS = 4
"""Fewest layers of a target: with fewer there are no three distinct outputs below the last layer."""


@dataclass(frozen=True)
class Eagle3Contract(LayersAndLast):
    """The rows of EAGLE-3."""

    images: bool = False
    """Whether conversations may have images."""

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        embeds = {"embeds": TensorSpec((), self.hidden)} if self.images else {}
        return {**super().tensors, **embeds}

    def rows(self, loss_mask: np.ndarray) -> dict[str, np.ndarray]:
        target = target_positions(loss_mask)
        columns = np.arange(target[-1] if target.size else 0, dtype=np.int64)
        return {"aux": columns, "last": target, **({"embeds": columns + 1} if self.images else {})}


def target_runs(masks: Masks) -> tuple[np.ndarray, np.ndarray]:
    """Return the runs of positions whose distribution is learnt: loss tokens that are followed by another one. The
    first column reads position 0, so the first position that can be learnt is 1.

    Returns:
        int64 ``[R]`` each, for each run of loss tokens: the first of these positions in its sample, and one past the
        last; both are equal if there are none. In the first unrolled step the columns one position earlier learn them,
        and in each later step one less at the end.
    """
    low_R = np.maximum(masks.runs.first_R, 1)
    return low_R, np.maximum(masks.runs.end_R - 1, low_R)


def target_positions(loss_mask: np.ndarray) -> np.ndarray:
    """Return the positions of one sample whose distribution is learnt: int64, ascending.

    Args:
        loss_mask: bool ``[tokens]``.
    """
    low_R, high_R = target_runs(Masks.of([loss_mask]))
    counts_R = high_R - low_R
    return np.arange(counts_R.sum()) + np.repeat(low_R - (np.cumsum(counts_R) - counts_R), counts_R)


def has_targets(loss_mask: np.ndarray) -> bool:
    """Whether a sample has any `target_positions`; in a tenth of their time, for each sample of a corpus is asked.

    Args:
        loss_mask: bool ``[tokens]``.
    """
    later = loss_mask[1:]
    return bool((later[1:] & later[:-1]).any())


def default_aux_layers(layers: int) -> tuple[int, ...]:
    """Return the low, middle and high layer that EAGLE-3's authors read, as indices of layer outputs.

    Args:
        layers: decoder layers of the target.

    Raises:
        ValueError: the target is too shallow for three distinct layers below its last one.
    """
    chosen = (1, layers // 2 - 1, layers - 4)
    if len(set(chosen)) == 3 and list(chosen) == sorted(chosen) and chosen[0] >= 0:
        return chosen
    if layers < LEAST_LAYERS:
        raise ValueError(f"{layers} layers give no three distinct outputs below the last layer")
    return tuple(sorted({0, (layers - 2) // 2, layers - 2}))
