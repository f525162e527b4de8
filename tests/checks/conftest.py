"""A configuration that passes every check, and targets that differ from the tiny one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specbatch.config import Config, load_config

Load = Callable[..., Config]


@pytest.fixture
def load(tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """A configuration of the tiny target (4 heads, 2 key heads, 6 layers, 2048 positions) on a machine without GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def make(*overrides: str, target: Path = tiny_target) -> Config:
        path = tmp_path / "a.yaml"
        path.write_text(
            f"run: {{dir: '{tmp_path}/run'}}\ntarget: {{path: '{target}'}}\n"
            "data: {train: [train.jsonl], heldout: [heldout.jsonl], max_tokens: 256, cache_dir: cache}\n"
            "draft: {vocab_size: 256}\ntraining: {tokens_per_pack: 512, warmup_steps: 0}\n"
            "store: {bytes_per_rank: 16MiB}\n"
        )
        return load_config(path, overrides)

    return make


@pytest.fixture
def changed(tiny_target: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny target with another config.json, and another tokenizer.json."""

    def make(tokenizer: Callable[[dict[str, Any]], None] | None = None, **config: Any) -> Path:
        folder = tmp_path / f"target-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_target, folder)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **config}))
        if tokenizer:
            content = json.loads((folder / "tokenizer.json").read_text())
            tokenizer(content)
            (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    return make
