"""Each rule with a run that breaks it, and all of them with one that breaks none."""

from __future__ import annotations

import numpy as np
import pytest

from specbatch.report.reading import read_run
from specbatch.report.references import earlier, project_references
from specbatch.report.rules import RULES, judge
from tests.report.synthetic import make_run

STEPS = 400
LATE = range(300, STEPS + 1)

PLANTED = {
    "wrong template": (
        "accuracy",
        {"reach": 0.22},
        "Accuracy of step 0 is 0.22 after 400 steps and 800 k tokens; the project's reference runs had 0.46 to 0.60",
    ),
    "loss on the wrong turn": ("loss tokens", {"loss_share": 0.97}, "97% of all tokens enter the loss"),
    "loss on hardly any token": ("loss tokens", {"loss_share": 0.02}, "Only 2.0% of all tokens enter the loss"),
    "answers of another model": (
        "answers",
        {"evaluation": {"acceptance_rate": [0.81, 0.5, 0.3]}},
        "accepts 81% of first drafts on its own answers, but only 62% are right",
    ),
    "served otherwise": (
        "decoding",
        {"evaluation": {"acceptance_rate": [0.21, 0.1, 0.0]}},
        "accepts 21% of first drafts in real decoding, but 62% are right on held-out conversations",
    ),
    "served otherwise, without held-out data": (
        "decoding",
        {"every": 0, "evaluation": {"acceptance_rate": [0.21, 0.1, 0.0]}},
        "but 62% are right on the training data",
    ),
    "learning rate too high: loss": (
        "learning rate",
        {"lines": {step: {"loss": 11.0} for step in LATE}},
        "The training loss rises",
    ),
    "learning rate too high: gradients": (
        "learning rate",
        {"lines": {step: {"grad_norm": 40.0} for step in range(250, STEPS)}},
        "Gradients grow: their norm was 0.",
    ),
    "learning rate too high: no number": (
        "learning rate",
        {"lines": {step: {"loss": None, "skipped": "loss is nan"} for step in LATE}},
        "101 of 400 steps were skipped",
    ),
    "vocabulary too small": (
        "vocabulary",
        {"config": {"draft": {"vocab_size": 300}}},
        "draft.vocab_size 300 covers 7",
    ),
    "trainers starved": ("balance", {"wait": 0.5}, "waited for packs 50% of the time: 2 engines are"),
    "draft worse than its start": (
        "held-out",
        {
            "config": {"draft": {"init_from": "drafts/published"}},
            "held_out": {20: {"loss": 4.0, "acceptance_length": 2.9}},
        },
        "worse now than near its start, from drafts/published: loss 4.00 and acceptance length 2.90 after step 20",
    ),
    "learnt by heart": (
        "held-out",
        {"held_out": {200: {"loss": 4.0, "acceptance_length": 2.6}}},
        "past its best: loss 4.00 and acceptance length 2.60 after step 200",
    ),
    "packs lost": ("packs", {"lines": {7: {"void_packs": 2}}}, "2 packs could not be computed"),
}


def test_nothing_is_off_with_a_normal_run(tmp_path):
    findings, unknown = judge(read_run(make_run(tmp_path / "a", STEPS).root), project_references())
    assert findings == []
    assert unknown == []


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_is_found_and_nothing_else(planted, tmp_path):
    rule, changes, words = PLANTED[planted]
    findings, _ = judge(read_run(make_run(tmp_path / "a", STEPS, **changes).root), project_references())
    # A draft that learns little from a wrong template also decodes worse than it might: only its own rule speaks.
    assert [finding.rule for finding in findings] == [rule]
    assert words in findings[0].what
    assert findings[0].do


def test_what_a_run_does_not_tell_is_named_and_no_finding(tmp_path):
    (tmp_path / "config.yaml").write_text("run:\n  dir: x\n")
    findings, unknown = judge(read_run(tmp_path), project_references())
    assert findings == []
    assert len(unknown) == len(RULES)
    assert "vocabulary of the draft: the prepared data no longer exists" in unknown


def test_too_early_to_tell_is_not_off(tmp_path):
    findings, unknown = judge(read_run(make_run(tmp_path / "a", 60, reach=0.1, attempts=1).root), project_references())
    assert [finding.rule for finding in findings if finding.rule == "accuracy"] == []
    assert any(text.startswith("accuracy beside other runs: fewer than") for text in unknown)


def test_the_users_own_runs_with_the_target_are_the_measure_where_there_are_any(tmp_path):
    run, good = (
        read_run(make_run(tmp_path / name, STEPS, reach=reach).root) for name, reach in (("a", 0.5), ("b", 0.8))
    )
    other = read_run(make_run(tmp_path / "c", STEPS, reach=0.95).root)
    other.provenance["target_fingerprint"] = "another target"
    references = [*earlier(run, [run, good, other]), *project_references()]
    assert [each.name for each in references if each.own] == ["b"]
    (finding,) = judge(run, references)[0]
    assert "your runs with this target had 0.80" in finding.what


def test_a_reference_is_compared_at_equal_tokens():
    quickstart = project_references()[0]
    assert quickstart.at(1000) is None
    assert quickstart.at(90_520) == pytest.approx(0.46)
    assert quickstart.at(1e9) == quickstart.accuracy_N[-1]
    assert np.all(np.diff(quickstart.tokens_N) > 0)
