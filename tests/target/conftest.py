"""Copies of the tiny target with another config.json or other tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Change = Callable[[dict[str, Any]], None]
Tensors = Callable[[dict[str, torch.Tensor]], None]
Variant = Callable[..., Path]


@pytest.fixture
def variant(tiny_target: Path, tmp_path: Path) -> Variant:
    """Makes a copy of the tiny target with another config.json or other tensors."""

    def make(config: Change | None = None, tensors: Tensors | None = None) -> Path:
        folder = tmp_path / f"target-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_target, folder)
        if config:
            content = json.loads((folder / "config.json").read_text())
            config(content)
            (folder / "config.json").write_text(json.dumps(content))
        if tensors:
            stored = load_file(folder / "model.safetensors")
            tensors(stored)
            save_file(stored, folder / "model.safetensors")
        return folder

    return make
