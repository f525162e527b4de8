"""FlexAttention's GPU kernels, as far as they can be tested without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.drafts.gpu_code import H100

pytestmark = [pytest.mark.light, pytest.mark.timeout(300)]

TOLERANCE = 1e-5
"""Relative difference that float32 allows."""


def printed(module: str, *words: str | Path, **environment: str) -> Any:
    command = [sys.executable, "-m", f"tests.drafts.{module}", *map(str, words)]
    environment = {**os.environ, **environment, "TRITON_CACHE_DIR": str(words[0])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_h100_can_run_both_passes(tmp_path: Path) -> None:
    """A case with the heads of qwen3-8b."""
    shared = printed("gpu_code", tmp_path, "bfloat16", "32", "8", "128")
    assert sum("template" in name or "_tem_" in name for name in shared) == 2, "one kernel forward, one backward"
    assert max(shared.values()) <= H100.shared_memory_per_block_optin


def test_the_kernels_of_both_passes_compute_dense_attention_and_its_gradients(tmp_path: Path) -> None:
    """Three query heads share a key head, as in SmolLM2."""
    made = printed("gpu_code", tmp_path, "float32", "3", "1", "16")
    found = printed("gpu_interpreted", tmp_path, "3", "1", "16", TRITON_INTERPRET="1")
    assert found["launches"] == dict.fromkeys(made, 1)
    assert max(found["apart"]) < TOLERANCE
