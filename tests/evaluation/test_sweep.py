"""The best settings, the commands that serve them, and what can't be measured."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest

from specbatch.config import Config, Data, Draft, Evaluate, Run, Sweep, Target
from specbatch.drafts.base import algorithm_of
from specbatch.drafts.block.config import DFlashDraft
from specbatch.drafts.eagle3.config import Eagle3Draft
from specbatch.errors import UserError
from specbatch.evaluation.engines import Subject
from specbatch.evaluation.sweep import best_settings, check_counts, check_sweep, sweep_document, sweep_lines
from specbatch.target import read_target


def subject(target: Path, draft: Draft | None = None, sglang: dict[str, Any] | None = None, **fields: Any) -> Subject:
    shape = read_target(target)
    settings = Evaluate(**fields)
    config = Config(
        run=Run(dir="run"), target=Target(path=str(target)), data=Data(train=[]), draft=draft or Eagle3Draft(),
        evaluate=settings,
    )  # fmt: skip
    config.inference.sglang = sglang or {}
    return Subject(config, settings, shape, algorithm_of(config, shape), Path("a draft"), Path("logs"))


def point(name: str, batch_size: int, draft_tokens: int, seconds: float) -> dict[str, Any]:
    return {
        "set": name, "batch_size": batch_size, "draft_tokens": draft_tokens, "seconds": seconds, "output_tokens": 100,
        "tokens_per_s": 100 / seconds, "tokens_per_s_request": 1.0, "first_token_s": 0.1,
    }  # fmt: skip


POINTS = [
    point("a", 1, 0, 10), point("b", 1, 0, 10), point("a", 1, 3, 4), point("b", 1, 3, 7), point("a", 1, 5, 3),
    point("b", 1, 5, 9), point("a", 8, 0, 1), point("b", 8, 0, 1), point("a", 8, 3, 2), point("b", 8, 3, 2),
    point("a", 8, 5, 3), point("b", 8, 5, 3),
]  # fmt: skip


def test_latency_is_judged_at_the_fewest_requests_and_throughput_at_all():
    best = best_settings(POINTS)
    assert (best["latency"]["batch_size"], best["latency"]["draft_tokens"]) == (1, 3)
    assert best["latency"]["speed_up"] == pytest.approx(20 / 11)
    assert (best["throughput"]["batch_size"], best["throughput"]["draft_tokens"]) == (8, 0)
    assert best["throughput"]["speed_up"] == 1


def test_the_commands_serve_the_best_settings(tiny_target: Path):
    found = sweep_document(subject(tiny_target, dtype="bfloat16"), POINTS)
    sglang, vllm = (shlex.split(found["best"]["latency"]["serve"][engine]) for engine in ("sglang", "vllm"))
    options = dict(zip(sglang[3::2], sglang[4::2], strict=True))
    assert sglang[:3] == ["python", "-m", "sglang.launch_server"]
    assert options == {
        "--model-path": str(tiny_target), "--max-running-requests": "1", "--dtype": "bfloat16",
        "--speculative-draft-model-path": str(Path("a draft").resolve()), "--speculative-algorithm": "EAGLE3",
        "--speculative-eagle-topk": "1", "--speculative-num-steps": "3", "--speculative-num-draft-tokens": "4",
    }  # fmt: skip
    assert vllm[:5] == ["vllm", "serve", str(tiny_target), "--max-num-seqs", "1"]
    assert '"num_speculative_tokens": 3' in vllm[-1]
    assert "speculative" not in found["best"]["throughput"]["serve"]["sglang"]
    lines = sweep_lines(found)
    assert lines[0].split()[:3] == ["set", "at", "once"]
    assert lines[2].split() == ["a", "1", "3", "25.0", "2.50", "1.0", "0.100", "s"]
    assert "best latency: 3 draft tokens with 1 at once, 18.2 tokens/s, 1.82 of plain decoding" in lines


def test_more_requests_than_the_engine_takes_are_refused(tiny_target: Path):
    found = subject(tiny_target, sglang={"max_running_requests": 32}, sweep=Sweep(batch_sizes=[1, 64]))
    with pytest.raises(UserError, match=r"evaluate.sweep.batch_sizes: 64: .*max_running_requests: 32"):
        check_sweep(found.config, found.algorithm)


def test_more_requests_than_prompts_are_refused(tiny_target: Path):
    found = subject(tiny_target, sweep=Sweep(batch_sizes=[1, 4]))
    check_counts(found, {"heldout": [[1]] * 4})
    with pytest.raises(UserError, match="4 requests at once are more than the 3 prompts of gsm8k"):
        check_counts(found, {"heldout": [[1]] * 4, "gsm8k": [[1]] * 3})


def test_more_draft_tokens_than_trained_are_warned_of_where_a_chain_goes_on_and_else_refused(tiny_target: Path):
    chain = subject(tiny_target, Eagle3Draft(ttt_steps=4), sweep=Sweep(draft_tokens=[3, 5]))
    [warning] = check_sweep(chain.config, chain.algorithm)
    assert "evaluate.sweep.draft_tokens: 5: the draft is trained to propose 4 at a time" in warning
    block = subject(tiny_target, DFlashDraft(block_size=4), sweep=Sweep(draft_tokens=[3, 5]))
    with pytest.raises(UserError, match=r"5: the draft is trained to propose 3 at a time, and has no more; .* most 3"):
        check_sweep(block.config, block.algorithm)
    assert check_sweep(dataclasses.replace(block.config, evaluate=Evaluate(draft_tokens=3)), block.algorithm) == []
    [warning] = check_sweep(dataclasses.replace(block.config, evaluate=Evaluate(draft_tokens=2)), block.algorithm)
    assert "evaluate.draft_tokens: 2: the draft is trained to propose 3 at a time; a shorter block" in warning
