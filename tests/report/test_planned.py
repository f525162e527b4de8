"""The planner's numbers, of a run whose data and target are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specbatch.report.planned import Planned, planned
from specbatch.report.reading import read_run
from specbatch.report.rules import NotKnown, small_vocabulary
from specbatch.rundir import RunDir


@pytest.fixture
def run_dir(tmp_path: Path, tiny_target: Path) -> RunDir:
    from specbatch.config import load_config
    from specbatch.corpus import attach, prepare

    talk = {
        "messages": [{"role": "user", "content": "Sun or rain?"}, {"role": "assistant", "content": "Rain, we like."}]
    }
    (tmp_path / "talks.jsonl").write_text((json.dumps(talk) + "\n") * 20)
    run = RunDir(tmp_path)
    run.config.write_text(
        f"run: {{dir: '{tmp_path}'}}\ntarget: {{path: '{tiny_target}'}}\n"
        "data: {train: [talks.jsonl], max_tokens: 64, cache_dir: cache}\ndraft: {vocab_size: 4}\n"
        "training: {tokens_per_pack: 128, packs_per_step: 2}\n"
    )
    attach(run, prepare(load_config(run.config)))
    return run


def test_a_run_is_planned_by_its_own_data_and_nothing_is_prepared(run_dir):
    corpus = json.loads(run_dir.corpus.read_text())["train"]
    found = planned(read_run(run_dir.root))
    assert isinstance(found, Planned)
    assert found.tokens == corpus["tokens"]
    assert found.steps >= 2
    assert found.source.startswith("assumed: ")


def test_why_a_run_can_not_be_planned_is_said(run_dir, tmp_path):
    Path(json.loads(run_dir.corpus.read_text())["train"]["path"]).rename(tmp_path / "elsewhere")
    why = planned(read_run(run_dir.root))
    assert isinstance(why, str)
    assert "no longer exist" in why
    run_dir.corpus.unlink()
    assert planned(read_run(run_dir.root)) == "the run is not prepared yet"


def test_the_vocabulary_is_judged_by_the_tokens_of_the_data(run_dir):
    finding = small_vocabulary(read_run(run_dir.root), [])
    assert finding is not None
    assert finding.what.startswith("draft.vocab_size 4 covers ")
    run_dir.corpus.unlink()
    with pytest.raises(NotKnown, match="no longer exist"):
        small_vocabulary(read_run(run_dir.root), [])
