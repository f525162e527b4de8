"""Rotary frequencies of the draft, which are those of its target."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Frequencies and attention scaling. Angles are float64 whatever the model computes in: rounded ones drift with
    the position."""

    head_dim: int
    theta: float
    max_positions: int
    scaling: tuple[tuple[str, Any], ...] = ()
    """Items of ``rope_scaling`` in Hugging Face's form; empty for the plain kind."""

    @cached_property
    def frequencies(self) -> tuple[Tensor, float]:
        """float64 ``[head_dim / 2]``, and a factor on cosine and sine.

        Raises:
            ValueError: for a kind of scaling that transformers does not know.
        """
        scaling = dict(self.scaling)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
            return self.theta**-exponent, 1.0
        # The many kinds of scaling are transformers' to know.
        from transformers import PretrainedConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if kind not in ROPE_INIT_FUNCTIONS:
            raise ValueError(f"rope_type {kind} is none of {', '.join(sorted(ROPE_INIT_FUNCTIONS))}")
        config = PretrainedConfig()
        config.head_dim, config.hidden_size, config.num_attention_heads = self.head_dim, self.head_dim, 1
        config.max_position_embeddings = self.max_positions
        config.rope_theta = self.theta
        config.rope_parameters = {**scaling, "rope_type": kind, "rope_theta": self.theta}
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return frequencies.double(), float(factor)

    def rotation(self, position_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each ``[N, 1, head_dim / 2]`` in ``dtype``.

        Args:
            position_N: int64.
        """
        frequencies, factor = self.frequencies
        angle = position_N[:, None, None].double() * frequencies.to(position_N.device, non_blocking=True)
        return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)
