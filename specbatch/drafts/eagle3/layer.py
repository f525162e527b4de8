"""The EAGLE-3 draft's decoder layer: its parameters, with the names that engines load."""

from __future__ import annotations

from torch import Tensor, nn

from specbatch.drafts.eagle3.memory import Shape
from specbatch.drafts.layers import MLP, RMSNorm


class Attention(nn.Module):
    """Projections of the draft's attention; inputs are an embedding and a state, concatenated."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.width = shape.head_dim
        self.q_proj = nn.Linear(2 * shape.hidden, shape.query, bias=False)
        self.k_proj = nn.Linear(2 * shape.hidden, shape.key, bias=False)
        self.v_proj = nn.Linear(2 * shape.hidden, shape.key, bias=False)
        self.o_proj = nn.Linear(shape.query, shape.hidden, bias=False)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weights that project inputs to queries, keys and values. Their first half of columns is for the
        embedding."""
        return self.q_proj.weight, self.k_proj.weight, self.v_proj.weight

    def heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """Return the projection of ``x``, ``[N, heads, head_dim]``."""
        return projection(x).unflatten(-1, (-1, self.width))


class Layer(nn.Module):
    """The draft's only decoder layer, with the names that engines load."""

    def __init__(self, shape: Shape, eps: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, eps)
        self.hidden_norm = RMSNorm(shape.hidden, eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, eps)
        self.mlp = MLP(shape.hidden, shape.intermediate)
