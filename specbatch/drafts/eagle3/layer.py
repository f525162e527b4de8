"""The EAGLE-3 draft's decoder layer: its parameters, with the names that engines load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from specbatch.drafts.layers import MLP, RMSNorm

if TYPE_CHECKING:
    from specbatch.drafts.eagle3.model import Eagle3Settings


class Attention(nn.Module):
    """Projections of the draft's attention; inputs are an embedding and a state, concatenated."""

    def __init__(self, config: Eagle3Settings) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.head_dim
        self.width = width
        self.q_proj = nn.Linear(2 * hidden, config.num_attention_heads * width, bias=False)
        self.k_proj = nn.Linear(2 * hidden, config.num_key_value_heads * width, bias=False)
        self.v_proj = nn.Linear(2 * hidden, config.num_key_value_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * width, hidden, bias=False)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weights that project inputs to queries, keys and values. Their first half of columns is for the
        embedding."""
        return self.q_proj.weight, self.k_proj.weight, self.v_proj.weight

    def heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """Return the projection of ``x``, ``[N, heads, head_dim]``."""
        return projection(x).unflatten(-1, (-1, self.width))


class Layer(nn.Module):
    """The draft's only decoder layer, with the names that engines load."""

    def __init__(self, config: Eagle3Settings) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
