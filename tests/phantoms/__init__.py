"""Targets of real size without weights: config.json and tensor names as on the hub, headers over sparse files.

What is known of them is in their own config.json as published; `Phantom.gib` is what the published files come to.
Everything that reads a target's files can be tried on them in milliseconds.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tests.phantoms.configs import (
    DEEPSEEK,
    FP8,
    FP8_ROWS,
    GEMMA3,
    GEMMA3_TEXT,
    GEMMA4,
    GEMMA4_TEXT,
    GLM,
    GPT_OSS_20B,
    GPT_OSS_120B,
    KIMI,
    KIMI_TEXT,
    LLAMA4,
    LLAMA4_TEXT,
    LLAMA_8B,
    MISTRAL,
    MISTRAL_TEXT,
    QWEN3_8B,
    QWEN3_30B,
    QWEN3_235B,
    QWEN35,
    QWEN35_TEXT,
)
from tests.phantoms.tensors import Tensors, dense, gpt_oss, mixture, stacked

BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I32": 4}


@dataclass(frozen=True)
class Phantom:
    """One target."""

    config: dict[str, Any]
    tensors: Callable[[], Tensors]
    files: int = 4
    gib: int = 0

    def write(self, folder: Path, *, tokenizer: Path | None = None) -> Path:
        """Make its directory.

        Args:
            tokenizer: a directory whose tokenizer it gets.
        """
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        items = list(self.tensors().items())
        size = -(-len(items) // self.files)
        where: dict[str, str] = {}
        for number, first in enumerate(range(0, len(items), size), 1):
            name = f"model-{number:05d}-of-{self.files:05d}.safetensors"
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            at = 0
            for tensor, (dtype, shape) in items[first : first + size]:
                end = at + BYTES[dtype] * prod(shape)
                header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
                at, where[tensor] = end, name
            raw = json.dumps(header).encode()
            with (folder / name).open("wb") as file:
                file.write(struct.pack("<Q", len(raw)) + raw)
                file.truncate(8 + len(raw) + at)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        for path in tokenizer.glob("tokenizer*") if tokenizer else ():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder


PHANTOMS = {
    "qwen3-8b": Phantom(QWEN3_8B, lambda: dense(QWEN3_8B), gib=15),
    "llama-3.1-8b": Phantom(LLAMA_8B, lambda: dense(LLAMA_8B), gib=15),
    "gpt-oss-20b": Phantom(GPT_OSS_20B, lambda: gpt_oss(GPT_OSS_20B), gib=13),
    "gpt-oss-120b": Phantom(GPT_OSS_120B, lambda: gpt_oss(GPT_OSS_120B), files=15, gib=61),
    "qwen3-30b-a3b": Phantom(QWEN3_30B, lambda: mixture(QWEN3_30B), files=16, gib=57),
    "qwen3-235b-a22b-fp8": Phantom(
        {**QWEN3_235B, "quantization_config": FP8}, lambda: mixture(QWEN3_235B, form="fp8"), files=24, gib=220
    ),
    "qwen3-235b-a22b-nvfp4": Phantom(
        {**QWEN3_235B, "quantization_config": {"quant_algo": "NVFP4", "quant_method": "modelopt"}},
        lambda: mixture(QWEN3_235B, form="nvfp4"),
        files=27,
        gib=125,
    ),
    "qwen3-235b-a22b-awq": Phantom(
        {**QWEN3_235B, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
        lambda: mixture(QWEN3_235B, form="awq"),
        files=25,
        gib=116,
    ),
    "qwen3-235b-a22b-gptq": Phantom(
        {**QWEN3_235B, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
        lambda: mixture(QWEN3_235B, form="gptq"),
        files=25,
        gib=116,
    ),
    "glm-4.6": Phantom(GLM, lambda: mixture(GLM), files=92, gib=664),
    "glm-4.6-fp8": Phantom(
        {**GLM, "quantization_config": FP8_ROWS}, lambda: mixture(GLM, form="fp8-rows"), files=93, gib=336
    ),
    "deepseek-v3.1": Phantom(DEEPSEEK, lambda: mixture(DEEPSEEK, form="fp8"), files=163, gib=641),
    "kimi-k2.5": Phantom(
        KIMI,
        lambda: mixture(KIMI_TEXT, "language_model.model.", experts_form="int4", head="language_model.lm_head.weight"),
        files=64,
        gib=554,
    ),
    "gemma-3-27b": Phantom(
        GEMMA3, lambda: dense({**GEMMA3_TEXT, "vocab_size": 262208}, "language_model.model.", None), gib=50
    ),
    "gemma-4-31b": Phantom(GEMMA4, lambda: dense(GEMMA4_TEXT, "model.language_model.", None), gib=58),
    "llama-4-scout": Phantom(
        LLAMA4, lambda: stacked(LLAMA4_TEXT, "language_model.model.", "language_model.lm_head.weight"), gib=200
    ),
    "qwen3.5-35b-a3b": Phantom(QWEN35, lambda: stacked(QWEN35_TEXT, "model.language_model.", "lm_head.weight"), gib=65),
    "mistral-small-3.2": Phantom(
        MISTRAL, lambda: dense(MISTRAL_TEXT, "language_model.model.", "language_model.lm_head.weight"), gib=44
    ),
}
