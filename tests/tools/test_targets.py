"""Tiny targets of real classes; `python -m tools.targets` takes them through the whole chain, by hand."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specbatch.target import read_target
from tools.targets.__main__ import kept_rows, summary, table
from tools.targets.chain import Row, run_chain
from tools.targets.checkpoints import LAYERS, VOCAB, make_checkpoint


@pytest.mark.parametrize("name", ["Qwen3-MoE", "DeepSeek-V3", "Qwen3-VL"])
def test_a_tiny_checkpoint_is_read_as_the_hub_s_would_be(name: str, tmp_path: Path) -> None:
    target = read_target(str(make_checkpoint(name, tmp_path / "target")))
    assert (target.layers, target.vocab, target.hidden) == (LAYERS, VOCAB, 64)


def test_the_last_line_counts_and_says_why() -> None:
    rows = [
        Row("Some", "SomeForCausalLM", right=True, difference=0.002, losses=(2.0, 1.9), identical="4/4", seconds=61.2)
    ]
    rows.append(Row("Other", why="SGLang's class keeps no states"))
    assert json.loads(summary(rows)) == {
        "targets": 2,
        "right": 1,
        "refused": {"Other": "SGLang's class keeps no states"},
    }
    assert table(rows).splitlines()[2:] == [
        "| Some | SomeForCausalLM | 2.0e-03 | 2.000, 1.900 | 4/4 | 61 | right |",
        "| Other |  |  |  |  | 0 | SGLang's class keeps no states |",
    ]


def test_a_run_that_was_broken_off_goes_on_from_the_newest_rows(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    assert kept_rows(results) == {}
    rows = [
        Row("Qwen3", why="SGLang was killed"),
        Row("Llama", right=True, losses=(2.0, 1.9)),
        Row("Qwen3", right=True),
    ]
    results.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    assert kept_rows(results) == {"Llama": rows[1], "Qwen3": rows[2]}


@pytest.mark.light
def test_classes_give_out_what_transformers_computes(tmp_path: Path) -> None:
    """Gemma-3, Mistral-3, Llama-4 and MiniMax-M2 are repaired; DeepSeek counts layers in its own way and has latent
    attention; gpt-oss has sinks; Qwen3-VL's positions have three parts."""
    names = ["Gemma-3", "DeepSeek-V3", "gpt-oss", "Mistral-3", "Llama-4", "MiniMax-M2", "Qwen3-VL"]
    folders = [str(make_checkpoint(name, tmp_path / name)) for name in names]
    command = [sys.executable, "-m", "tools.targets.prefill", *folders, "--layers", "2", "3", "5"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    told = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert [row["target"] for row in told] == names, ended.stderr[-2000:]
    for row in told:
        assert row.get("problem", row) is None
        assert max(row["difference"].values()) < 1e-4, row


@pytest.mark.light
def test_a_target_that_also_sees_goes_through_the_whole_chain_with_images(tmp_path: Path) -> None:
    row = run_chain("Mistral-3-Images", tmp_path)
    assert row.right, row.why
    assert row.identical == "4/4"
