"""A draft that SGLang cannot run on a CPU is measured by the evaluations of its training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specbatch.config import Config, Data, Run, Target, Training, dump_config
from specbatch.drafts.block.algorithm import DFlash, DSpark
from specbatch.drafts.block.config import DFlashDraft, DSparkDraft
from specbatch.errors import UserError
from specbatch.evaluation import serving
from specbatch.evaluation.serving import report
from specbatch.evaluation.stored_states import check_measurable
from specbatch.evaluation.summary import summary_line
from specbatch.rundir import RunDir
from specbatch.target import read_target


def config(tiny_target: Path, draft: DFlashDraft | DSparkDraft, interval: int | None = None) -> Config:
    return Config(
        run=Run(dir="run"), target=Target(path=str(tiny_target)), data=Data(train=["a.jsonl"]), draft=draft,
        training=Training(evaluate_interval_steps=interval),
    )  # fmt: skip


def test_what_nothing_could_measure_is_refused_before_anything_starts(tiny_target: Path):
    target = read_target(tiny_target)
    flash, spark = config(tiny_target, DFlashDraft()), config(tiny_target, DSparkDraft())
    check_measurable(flash, DFlash(flash, target))
    with pytest.raises(UserError, match=r"draft.algorithm: SGLang does not run drafts of DSpark on a CPU"):
        check_measurable(spark, DSpark(spark, target))
    check_measurable(config(tiny_target, DSparkDraft(), 10), DSpark(spark, target))


def test_a_draft_that_sglang_does_not_run_here_gets_an_evaluation_from_stored_states(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = config(tiny_target, DSparkDraft(block_size=2, confidence=False, mask_token_id=400), 10)
    algorithm, run_dir = DSpark(given, read_target(tiny_target)), RunDir(tmp_path)
    run_dir.config.write_text(dump_config(given))
    run_dir.export.mkdir()
    exported = algorithm.files.hf_config({}, target_name=str(tiny_target), draft_tokens=2)
    (run_dir.export / "config.json").write_text(json.dumps(exported))
    save_file({"norm.weight": torch.ones(1)}, run_dir.export / "model.safetensors")
    monkeypatch.setattr(serving, "accelerator_available", lambda: False)
    with pytest.raises(UserError, match="no evaluation during training"):
        serving.evaluate(run_dir)
    assert not run_dir.evaluation.exists()
    rows = [
        {"step": step, "evaluation": {"loss": 2.0, "accuracy": [0.5, 0.25], "acceptance_length": length, "accepted": n}}
        for step, length, n in ((10, 1.75, [2, 1, 1]), (20, 1.5, [2, 2, 0]))
    ]
    run_dir.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    serving.evaluate(run_dir)
    found = json.loads(run_dir.evaluation.read_text())
    assert (found["step"], found["acceptance_length"], found["acceptance_rate"]) == (10, 1.75, [0.5, 0.25])
    assert "nothing was decoded: SGLang does not run drafts of DSpark on a CPU" in found["note"]
    assert "from stored states" in summary_line(found, tmp_path)
    assert report(found)[-1].startswith("note: nothing was decoded")
