"""The capture contract: what a draft algorithm reads of the target, and nothing else about drafts.

The engine's plugin stores what the contract names, the dispatcher counts its bytes before anything is
computed, and the trainer knows from it how many rows it must get. Only numpy is needed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

BYTES_PER_VALUE = 2
"""Hidden states travel as bfloat16."""


@dataclass(frozen=True)
class CaptureContract:
    """What EAGLE-3 (arXiv:2503.01840, §3) reads of a target with ``hidden`` wide states.

    Draft column ``i`` of unrolled step ``k`` reads ``aux[i]`` and the token ``i + 1 + k``, and learns the
    target's distribution at position ``i + 1 + k``, which is the distribution of token ``i + 2 + k``. That
    token has to be a loss token, so ``last`` is needed at the positions before loss tokens, and ``aux`` up
    to the last column that learns anything.
    """

    aux_layers: tuple[int, ...]
    """Indices of the target's decoder layers whose outputs are concatenated, ascending, from 0."""
    hidden: int
    """Width of the target's hidden states."""

    @property
    def widths(self) -> dict[str, int]:
        """Values a row of each tensor."""
        return {"aux": len(self.aux_layers) * self.hidden, "last": self.hidden}

    def rows(self, loss_mask: np.ndarray) -> dict[str, np.ndarray]:
        """The positions of a sample whose rows are stored.

        Args:
            loss_mask: bool ``[tokens]``.

        Returns:
            int64 ``[rows]`` for each tensor, ascending; both empty where nothing can be learnt.
        """
        import numpy as np

        target = np.flatnonzero(loss_mask[2:]) + 1
        columns = target[-1] if target.size else 0
        return {"aux": np.arange(columns, dtype=np.int64), "last": target.astype(np.int64)}

    def bytes(self, loss_mask: np.ndarray) -> int:
        """Bytes that a sample occupies in the store."""
        return sum(BYTES_PER_VALUE * self.widths[name] * rows.size for name, rows in self.rows(loss_mask).items())


def default_aux_layers(layers: int) -> tuple[int, ...]:
    """The low, middle and high layer that EAGLE-3's authors read, as indices of layer outputs.

    Args:
        layers: decoder layers of the target.

    Raises:
        ValueError: if the target is too shallow for three distinct layers below its last one.
    """
    chosen = (1, layers // 2 - 1, layers - 4)
    if len(set(chosen)) == 3 and list(chosen) == sorted(chosen) and chosen[0] >= 0:
        return chosen
    if layers < 4:
        raise ValueError(f"{layers} layers give no three distinct outputs below the last layer")
    return tuple(sorted({0, (layers - 2) // 2, layers - 2}))
