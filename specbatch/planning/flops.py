"""Floating point operations, by formula: a multiplication and an addition count as two, as vendors count them.

Sources: a matrix of ``n`` weights costs ``2 n`` per row, and its backward pass twice that (Kaplan et al.,
arXiv:2001.08361, §2.1); causal attention of one head reads on average half of the context, ``2 T² D`` for scores and
values together (Dao, arXiv:2307.08691, §4.1), and its backward pass is 2.5 times its forward pass, scores being
computed again. Norms, rotations and activations are left out, as there.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from specbatch.target import AttentionLayers, TargetShape

FORMATS = {"BF16": "bf16", "F16": "bf16", "F32": "bf16", "F8_E4M3": "fp8", "U8": "nvfp4", "I32": "int4", "I8": "int8"}
"""Format in which matrices are multiplied, by the dtype in which they are stored."""
_IN_A_VALUE = {"U8": 2, "I32": 8}
"""Number of 4-bit weights in a value of these dtypes."""
_EXPERT = re.compile(r"\.experts?\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_ELSEWHERE = re.compile(r"vision|visual|audio|(^|\.)mtp\.")
"""Matches tensors of vision and audio encoders and of prediction layers."""
_NO_MATRIX = ("scale", "scales", "_scale_inv", "_scale_2", "zeros", "zero_point", "g_idx", "_shape", "bias")
_MXFP4 = "_blocks"


@dataclass(frozen=True)
class ActiveWeights:
    """The weights that a token passes through on its way to the hidden states."""

    count: int
    format: str
    """Format in which most of them are stored: a value of `FORMATS`, or ``mxfp4``."""


def active_weights(target: TargetShape) -> ActiveWeights:
    """Count the weights of the target's matrices that compute a token.

    These are all layers, and as many routed experts as a token is sent to. Embedding, head, prediction layers and
    vision and audio encoders are not counted. For packed formats (MXFP4, NVFP4, AWQ, GPTQ, compressed-tensors) the
    weights are counted, not the values that contain them, and neither scales nor zero points.
    """
    experts = target.experts
    share = experts.chosen / experts.count if experts else 1.0
    totals: dict[str, float] = {}
    for name, stored in target.weights.tensors.items():
        layer = _LAYER.search(name)
        if layer is None or len(stored.shape) < 2 or name.endswith(_NO_MATRIX):
            continue
        if int(layer[1]) >= target.layers or _ELSEWHERE.search(name):
            continue
        count = math.prod(stored.shape) * _IN_A_VALUE.get(stored.dtype, 1)
        stacked = experts is not None and len(stored.shape) > 2 and stored.shape[0] == experts.count
        form = "mxfp4" if name.endswith(_MXFP4) else FORMATS.get(stored.dtype, "bf16")
        totals[form] = totals.get(form, 0.0) + count * (share if stacked or _EXPERT.search(name) else 1.0)
    return ActiveWeights(round(sum(totals.values())), max(totals, key=lambda form: totals[form], default="bf16"))


def engine_flops(attention: tuple[AttentionLayers, ...], weights: int, captured_S: np.ndarray) -> np.ndarray:
    """Return the operations of a target's forward pass over the given number of tokens of each sample: float ``[S]``.

    Args:
        attention: attention of each of its layers. Windows leave out pairs that are further apart.
        weights: number of weights that compute a token.
    """
    tokens_S = captured_S.astype(np.float64)
    flops_S = 2 * weights * tokens_S
    for kind in attention:
        pairs_S = tokens_S**2 / 2
        if kind.window is not None:
            beyond_S = np.maximum(tokens_S - kind.window, 0)
            pairs_S -= beyond_S**2 / 2
        flops_S += kind.layers * (kind.pair_flops * pairs_S + kind.token_flops * tokens_S)
    return flops_S
