"""A smaller form of ``configs/dflash-by-heart.yaml``: a wrong shift, mask or name could not hide.

The draft is measured as a published one, from its files alone, instead of by its run: both decode in the same way.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.light
@pytest.mark.timeout(600)
def test_what_was_learnt_by_heart_is_accepted_by_sglang(tmp_path: Path, smollm: Path) -> None:
    shipped = REPOSITORY / "configs" / "dflash-by-heart"
    for name in ("conversations", "again"):
        first = (shipped / f"{name}.jsonl").read_text().splitlines()[0]
        (tmp_path / f"{name}.jsonl").write_text(first + "\n")
    given = {
        "run.dir": tmp_path / "run", "target.path": smollm, "data.cache_dir": tmp_path / "cache",
        "data.train": f"[{tmp_path}/conversations.jsonl]", "data.heldout": f"[{tmp_path}/again.jsonl]",
        "training.epochs": 32, "evaluate.prompts": 0,
    }  # fmt: skip
    specbatch("run", f"--config={shipped}.yaml", *(f"--{name}={value}" for name, value in given.items()))
    published = tmp_path / "published"
    published.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "run" / "export" / name, published)
    specbatch(
        "evaluate", f"--draft={published}", f"--target={smollm}", f"--heldout={tmp_path}/again.jsonl",
        f"--out={tmp_path}/out", "--max_new_tokens=32", "--dtype=float32",
    )  # fmt: skip
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert evaluation["acceptance_length"] >= 3.0
    assert evaluation["identical"] == evaluation["prompts"] == 1
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["evaluation"]["accepted"] == evaluation["accepted_histogram"]


def specbatch(*words: str) -> None:
    """Run a verb."""
    done = subprocess.run(
        [sys.executable, "-m", "specbatch", *words], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
