"""What block drafts read from the target, and the rule that derives the positions from a loss mask.

A block stands at an anchor: the newest token while decoding, which the target chose itself. So an anchor is a loss
token that is followed by another one, and never the first token of a sample. Its block reads ``aux`` at every position
before the anchor, and proposes the tokens after it. Those are learnt that follow the anchor in an unbroken run of loss
tokens. The distribution of the token at a position comes from ``last`` one position earlier.
"""

from __future__ import annotations

import numpy as np

from specbatch.drafts.layers_and_last import LayersAndLast
from specbatch.drafts.masks import Masks

MARGIN = 3
"""Number of target layers above the highest one that is read by default."""


class BlockContract(LayersAndLast):
    """The rows of block drafts."""

    def rows(self, loss_mask: np.ndarray) -> dict[str, np.ndarray]:
        anchors = np.flatnonzero(is_candidate(Masks.of([loss_mask]))).astype(np.int64)
        # The token after an anchor is learnt from the state at the anchor.
        return {"aux": np.arange(anchors[-1] if anchors.size else 0, dtype=np.int64), "last": anchors}


def is_candidate(masks: Masks) -> np.ndarray:
    """Return the positions at which a block may stand, bool ``[N]``; distributions are learnt at the same positions."""
    return masks.mask_N & masks.ahead(masks.mask_N, 1) & (masks.position_N >= 1)


def default_aux_layers(draft_layers: int, target_layers: int) -> tuple[int, ...]:
    """Return the layers that DFlash's authors read, as indices of layer outputs: as many as the draft has layers,
    evenly spaced from the second to the fourth last one; fewer if the target has too few.

    Raises:
        ValueError: the target has fewer than two layers.
    """
    if target_layers < 2:
        raise ValueError(f"{target_layers} layers give no output below the last layer")
    if draft_layers == 1 or target_layers <= MARGIN + 1:
        return (min(target_layers // 2, target_layers - 2),)
    high = target_layers - MARGIN - 1
    return tuple(sorted({round(1 + i * high / (draft_layers - 1)) for i in range(draft_layers)}))
