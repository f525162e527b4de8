"""Evaluations have held-out data with answers, and measure what is asked."""

from __future__ import annotations

import json

import pytest

from specbatch.checks import check, check_plan
from specbatch.corpus import corpus_of, make_plan, prepare
from specbatch.drafts.base import algorithm_of
from specbatch.errors import UserError
from specbatch.target import read_target
from tests.checks.messages import refused


def test_evaluations_need_held_out_data_and_should_meet_snapshots(load):
    message = refused(load("--training.evaluate_interval_steps=10", "--data.heldout=[]", "--evaluate.prompts=0"))
    assert message.startswith("training.evaluate_interval_steps: 10: evaluations use data.heldout, which is empty")
    assert check(load("--training.evaluate_interval_steps=50", "--snapshot.interval=100")) == []
    assert check(load("--training.evaluate_interval_steps=30", "--snapshot.interval=10min")) == []
    (warning,) = check(load("--training.evaluate_interval_steps=30", "--snapshot.interval=100"))
    assert "snapshot.interval: 100 seldom meet" in warning


def test_what_a_sweep_cannot_measure_is_refused_and_what_it_measures_in_vain_is_warned_of(load, tmp_path):
    message = refused(load("--evaluate.sets.gsm8k=absent.jsonl"))
    assert message.endswith("absent.jsonl: no such file")
    message = refused(load("--evaluate.sweep.batch_sizes=[1,64]", "--inference.sglang.max_running_requests=32"))
    assert message.startswith(
        "evaluate.sweep.batch_sizes: 64: the engine decodes inference.sglang.max_running_requests"
    )
    (warning,) = check(load("--evaluate.draft_tokens=9"))
    assert warning.startswith("evaluate.draft_tokens: 9: the draft is trained to propose 7 at a time")
    assert check(load("--evaluate.draft_tokens=9", "--evaluate.sets.gsm8k=absent.jsonl", "--evaluate.prompts=0")) == []


def test_held_out_data_without_answers_evaluate_nothing(load, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "the licence of the work " * 40}))
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Why?"}]}))
    config = load("--training.evaluate_interval_steps=50", "--data.max_bad_fraction=1")
    corpus = corpus_of(prepare(config))
    algorithm = algorithm_of(config, read_target(config.target.path))
    with pytest.raises(UserError, match=r"data\.heldout: no sample can be used for evaluation"):
        check_plan(config, make_plan(config, corpus), corpus, algorithm)
