"""The formula against measured peaks, and what it says of large models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from specbatch.drafts.eagle3.memory import Shape, StepWork, rank_bytes, step_bytes
from tools.bench.held import held
from tools.bench.step import parse

STEP = Path(__file__).parents[3] / "tools" / "bench" / "step.py"
TOLERANCE = 0.2
"""Share of the measured peak by which the formula may be off."""

LARGE = Shape(
    hidden=4096, intermediate=12288, heads=32, kv_heads=8, head_dim=128, vocab=151936, draft_vocab=32000
)  # fmt: skip
LEAN = StepWork(tokens=32768, ttt_steps=7, columns_at_once=2048, recompute="all", value_bytes=2, gpu=True)


@pytest.mark.light
@pytest.mark.parametrize("recompute", ["none", "all_but_attention", "all"])
def test_the_formula_gives_the_measured_peak(recompute: str) -> None:
    # 1,020 columns are cut into three equal chunks; 350 at once is close to that, as the formula expects of a full one.
    command = [
        sys.executable, str(STEP), "--tokens", "1024", "--loss-fraction", "1", "--ttt-steps", "4", "--threads", "1",
        "--repeat", "0", "--columns-at-once", "350", "--recompute", recompute, "--only", "ours",
    ]  # fmt: skip
    # The formula speaks of what is in use. glibc keeps what was freed, some 50 MB here, unless it maps every large
    # block by itself.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(256 << 10)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["predicted_bytes"] == pytest.approx(found["peak_bytes"], rel=TOLERANCE)


def counted(monkeypatch: pytest.MonkeyPatch, options: str, **switches: bool) -> dict[str, float]:
    """Return the peak bytes of a step's tensors on a GPU, without packs, and the formula's result."""
    monkeypatch.setattr(sys, "argv", [str(STEP), "--loss-fraction", "1", *options.split()])
    return held(parse(), **switches)


@pytest.mark.light
@pytest.mark.parametrize(
    "options",
    [
        "--shape smollm2 --tokens 4096",
        "--shape smollm2 --tokens 4096 --dtype float32",
        "--shape smollm2 --tokens 4096 --recompute all_but_attention",
        "--shape smollm2 --tokens 4096 --recompute all",
        "--shape qwen3-8b --tokens 2048 --ttt-steps 3",
        "--shape kimi-k2.5 --tokens 4096",
    ],
)
def test_the_formula_gives_what_tensors_occupy_on_a_gpu(monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    found = counted(monkeypatch, options)
    assert 0.98 < found["predicted_bytes"] / found["peak_bytes"] < 1.1


@pytest.mark.light
@pytest.mark.parametrize(
    "options", ["--shape smollm2 --tokens 4096", "--shape smollm2 --tokens 4096 --dtype float32 --recompute all"]
)
def test_the_formula_knows_what_an_embedding_of_the_draft_takes(monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    found = counted(monkeypatch, options, own_embedding=True)
    assert 0.98 < found["predicted_bytes"] / found["peak_bytes"] < 1.1


@pytest.mark.light
@pytest.mark.parametrize("recompute", ["none", "all_but_attention", "all"])
def test_the_formula_knows_what_the_norms_of_eagle_3_1_take(monkeypatch: pytest.MonkeyPatch, recompute: str) -> None:
    options = f"--shape smollm2 --tokens 4096 --recompute {recompute}"
    found = counted(monkeypatch, options, fc_norm=True, norm_output=True)
    assert 0.98 < found["predicted_bytes"] / found["peak_bytes"] < 1.1


@pytest.mark.light
def test_a_step_of_32k_tokens_and_a_whole_vocabulary_of_152k_fits_in_14_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs included, neither weights nor optimizer. For 128k tokens: the same command with --tokens 131072."""
    found = counted(monkeypatch, "--shape qwen3-8b --draft-vocab 151936 --tokens 32768")
    assert found["peak_bytes"] + found["pack_bytes"] < 14e9


def test_32k_tokens_of_an_8b_target_fit_in_14_gb_of_two_ranks_with_weights_and_optimizer() -> None:
    assert sum(rank_bytes(LARGE, LEAN, ranks=2, stored_bytes=2).values()) < 14e9


def test_a_step_over_a_whole_vocabulary_of_152k_fits_in_14_gb_beside_weights_and_optimizer() -> None:
    whole = replace(LARGE, draft_vocab=LARGE.vocab)
    assert sum(step_bytes(whole, replace(LEAN, recompute="none")).values()) < 14e9


def test_128k_tokens_fit_in_80_gb_on_one_gpu() -> None:
    whole = replace(LARGE, draft_vocab=LARGE.vocab)
    work = replace(LEAN, tokens=131072, recompute="none")
    assert sum(rank_bytes(whole, work, ranks=1, stored_bytes=2).values()) < 80e9


def test_memory_does_not_grow_with_tokens_times_vocabulary_or_steps() -> None:
    """Twice the tokens add what their rows and first keys take, whatever the vocabulary and the number of steps."""
    for work in (LEAN, replace(LEAN, recompute="none")):
        growth = {
            sum(step_bytes(shape, replace(w, tokens=2 * w.tokens)).values()) - sum(step_bytes(shape, w).values())
            for shape in (LARGE, replace(LARGE, draft_vocab=150000))
            for w in (work, replace(work, ttt_steps=14))
        }
        assert len(growth) == 1
