"""An algorithm that specbatch does not know goes through all of it: nothing but an entry point is added."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.run.test_local import Run, new_run

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of one who has the toy's package installed."""
    site = tmp_path_factory.mktemp("site")
    about = site / "parallel_head-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: parallel-head\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[specbatch.drafts]\nparallel_head = tests.drafts.toy.parallel_head:ParallelHead\n"
    )
    return {**os.environ, "PYTHONPATH": f"{site}:{REPOSITORY}"}


def specbatch(environment: dict[str, str], *words: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "specbatch", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def run(tmp_path: Path, tiny_target: Path) -> Run:
    made = new_run(tmp_path / "toy", tiny_target)
    text = made.config.read_text().replace("{ttt_steps: 3, vocab_size: 64}", "{algorithm: parallel_head, layer: 3}")
    text = text.replace("max_steps: 8,", "max_steps: 6, evaluate_interval_steps: 3, schedule: constant,")
    made.config.write_text(text.replace("snapshot: {interval: 3}", "snapshot: {interval: 3, record: 6}"))
    return made


def test_its_fields_are_its_own_and_nobody_elses(environment: dict[str, str], run: Run) -> None:
    config = str(run.config)
    assert "layer: 3" in specbatch(environment, "run", "--config", config, "--print_config")
    words = specbatch(environment, "run", "--config", config, "--draft.ttt_steps", "3", code=2)
    assert "draft.ttt_steps: is a field of draft.algorithm: eagle3" in words
    words = specbatch(environment, "run", "--config", config, "--draft.layer", "5", code=2)
    assert "draft.layer: 5 is none of the target's" in words


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_is_planned_trained_resumed_replayed_evaluated_and_exported(
    environment: dict[str, str], run: Run, tiny_target: Path
) -> None:
    config, root = str(run.config), str(run.root)
    planned = json.loads(specbatch(environment, "plan", "--config", config, "--json"))
    specbatch(environment, "run", "--config", config, "--training.max_steps", "3")
    specbatch(environment, "resume", root, "--training.max_steps", "6")
    lines = run.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["terms"] == ["head 0"] and len(line["losses"]) == len(line["accuracy"]) == 1 for line in lines)
    assert planned["work"]["live"] == [sum(line["loss_tokens"] for line in lines)]
    assert sum(line["evaluation"]["acceptance_length"] >= 1 for line in lines if "evaluation" in line) == 2
    assert set(load_file(run.root / "export" / "model.safetensors")) == {"fc.weight"}
    verdicts = json.loads(specbatch(environment, "replay", root, "--from", "3", "--json"))
    assert [(verdict["step"], verdict["same"]) for verdict in verdicts] == [(4, True), (5, True), (6, True)]
