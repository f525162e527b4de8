"""Data for `step`: shapes of known models, and chat-like masks. Does not import torch."""

from __future__ import annotations

import random

SHAPES = {
    "smollm2": (576, 1536, 9, 3, 64, 49152, 8192),
    "llama-3.1-8b": (4096, 14336, 32, 8, 128, 128256, 32000),
    "qwen3-8b": (4096, 12288, 32, 8, 128, 151936, 32000),
    "kimi-k2.5": (7168, 18432, 64, 8, 128, 163840, 163840),
}
"""Arguments of `specbatch.drafts.eagle3.memory.Shape`: target and draft."""
TOY, TOY_SHAPE = "toy", (64, 128, 4, 2, 16, 512, 128)


def conversations(tokens: int, mean: int, fraction: float) -> list[list[bool]]:
    """Return masks of chat-like samples: mixed lengths, turns of question and answer."""
    draw = random.Random(0)
    masks: list[list[bool]] = []
    while (left := tokens - sum(map(len, masks))) > 0:
        length = min(left, max(16, int(draw.lognormvariate(0, 0.6) * mean)))
        mask: list[bool] = []
        while len(mask) < length:
            turn = draw.randint(60, 240)
            answer = round(turn * fraction)
            mask += [False] * (turn - answer) + [True] * answer
        masks.append(mask[:length])
    return masks
