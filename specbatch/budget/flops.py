"""Floating point operations, by formula: a multiplication and an addition count as two, as vendors count them.

Sources: a matrix of ``n`` weights costs ``2 n`` a row, and its backward pass twice that (Kaplan et al.,
arXiv:2001.08361, §2.1); causal attention of one head reads on average half of the context, ``2 T² D`` for scores and
values together (Dao, arXiv:2307.08691, §4.1), and its backward pass is 2.5 times its forward pass, scores being
computed again. Norms, rotations and activations are left out, as there.
"""

from __future__ import annotations

import re

import numpy as np

from specbatch.budget.samples import SampleCosts
from specbatch.target import TargetShape, language_config
from specbatch.training.memory import Shape

_PACKED = {"I32": 8, "U8": 2}
"""Weights of four bits in a value of these types."""
_EXPERT = re.compile(r"\.experts\.")
_SEES = re.compile(r"vision|visual")
_EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")


def active_weights(target: TargetShape) -> int:
    """Weights of the target's matrices that a token passes through on its way to the hidden states.

    All of its layers; of routed experts as many as a token is sent to. Embedding and head compute nothing here, nor
    does what sees pictures.
    """
    text_config = language_config(target)
    chosen = text_config.get("num_experts_per_tok") or 0
    experts = next((text_config[key] for key in _EXPERT_COUNTS if text_config.get(key)), 0)
    share = chosen / experts if chosen and experts else 1.0
    total = 0.0
    for name, stored in target.weights.tensors.items():
        if ".layers." not in f".{name}" or _SEES.search(name) or len(stored.shape) < 2:
            continue
        count = float(np.prod(stored.shape))
        if name.endswith("packed"):
            count *= _PACKED.get(stored.dtype, 1)
        total += count * (share if _EXPERT.search(name) else 1.0)
    return round(total)


def engine_flops(target: TargetShape, weights: int, captured_S: np.ndarray) -> np.ndarray:
    """float ``[S]``: of a target's forward pass over so many tokens of each sample."""
    tokens = captured_S.astype(np.float64)
    return 2 * weights * tokens + 2 * target.layers * target.heads * target.head_dim * tokens**2


def draft_flops(shape: Shape, costs: SampleCosts, *, backward: bool = True) -> np.ndarray:
    """float ``[S]``: of EAGLE-3's unrolled steps on live columns, with loss and gradients.

    The projection of the target's states needs no gradient of its input, the target's head none at all.

    Args:
        backward: False for an evaluation.
    """
    hidden, query, key = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    both, head, first = (3.0, 3.0 if shape.train_head else 2.0, 2.0) if backward else (1.0, 1.0, 1.0)
    scores = 1 + 2.5 if backward else 1.0
    flops = costs.columns_S * 2.0 * (first * shape.first + both * 2 * hidden * 2 * key)
    flops += costs.targets_S * 2.0 * shape.head
    for k, live_S in enumerate(costs.live_KS):
        own = 2 * hidden * 2 * key if k else 0
        layer = 2 * hidden * query + own + query * hidden + 3 * hidden * shape.intermediate
        flops += both * 2.0 * live_S * layer
        flops += head * 2.0 * costs.learning_KS[k] * shape.head
        flops += scores * 4.0 * query * costs.pairs_KS[k]
    return flops
