"""Rotary frequencies of the draft, which are those of its target."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from specbatch.target import TargetShape


@dataclass(frozen=True)
class Rope:
    """Frequencies and attention scaling. Angles are float64 whatever the compute dtype, since the error of rounded ones
    grows with the position."""

    head_dim: int
    theta: float
    max_positions: int
    scaling: tuple[tuple[str, Any], ...] = ()
    """Items of ``rope_scaling`` in Hugging Face's form; empty without scaling."""

    @classmethod
    def of(cls, target: TargetShape, head_dim: int) -> Rope:
        """Return the target's RoPE for heads of this width."""
        scaling = target.rope["rope_scaling"] or {}
        return cls(head_dim, target.rope["rope_theta"], target.max_positions, tuple(scaling.items()))

    @cached_property
    def frequencies(self) -> tuple[Tensor, float]:
        """Return the frequencies, float64 ``[head_dim / 2]``, and a factor on cosine and sine.

        Raises:
            ValueError: transformers does not support this kind of scaling.
        """
        scaling = dict(self.scaling)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
            return self.theta**-exponent, 1.0
        # transformers implements the many kinds of scaling.
        from transformers import PretrainedConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if kind not in ROPE_INIT_FUNCTIONS:
            raise ValueError(f"rope_type {kind} is not one of {', '.join(sorted(ROPE_INIT_FUNCTIONS))}")
        config = PretrainedConfig()
        config.head_dim, config.hidden_size, config.num_attention_heads = self.head_dim, self.head_dim, 1
        config.max_position_embeddings = self.max_positions
        config.rope_theta = self.theta
        config.rope_parameters = {**scaling, "rope_type": kind, "rope_theta": self.theta}
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return frequencies.double(), float(factor)

    def rotation(self, position_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, each ``[N, 1, head_dim / 2]`` in ``dtype``.

        Args:
            position_N: int64.
        """
        frequencies, factor = self.frequencies
        angle = position_N[:, None, None].double() * frequencies.to(position_N.device, non_blocking=True)
        return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)
