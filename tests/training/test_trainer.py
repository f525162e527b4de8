"""Real ranks of torchtitan under torch's elastic agent, fed by a real store, begun by a real dispatcher."""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from specbatch.config import dump_config
from specbatch.corpus import make_plan, open_corpus
from specbatch.dispatch.claims import VOID_LOSSES
from specbatch.dispatch.messages import Phase
from specbatch.drafts.base import algorithm_of
from specbatch.drafts.eagle3.model import Eagle3Module
from specbatch.drafts.masks import Masks
from specbatch.evaluation.replayed import accepted_counts
from specbatch.pack_manifest import PackId
from specbatch.plan import Pack, Plan
from specbatch.replay import replay
from specbatch.rundir import RunDir
from specbatch.snapshot.manifest import snapshots
from specbatch.target import embedding, lm_head, read_target
from specbatch.training.feed.buffers import PackRows
from specbatch.transfer.master import Master
from tests.training.stage import Stage, make_config, store_master, target_rows, without_times
from tests.training.test_trackers import in_tensorboard, in_wandb

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Outcome:
    """The results of a run."""

    lines: list[dict[str, Any]]
    state: dict[str, torch.Tensor]
    values: dict[str, Any]
    lost: int
    void: list[PackId]
    phase: Phase


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A space in its name, as a user's may have."""
    return tmp_path_factory.mktemp("a run")


@pytest.fixture(scope="module")
def master(folder: Path) -> Iterator[Master]:
    with store_master(folder) as master:
        yield master


def stage_at(
    folder: Path,
    target: Path,
    master: Master,
    name: str,
    *,
    ranks: int = 2,
    together: int = 1,
    attempt: int = 1,
    record: int = 0,
    trackers: Sequence[str] = (),
) -> Stage:
    """A run of its own, all on the same conversations. All of the second rank's packs of step 2 are void."""
    config = make_config(target, folder, ranks=ranks)
    config.run.dir, config.training.context_parallel = str(folder / name), together
    config.snapshot.record, config.training.metrics = record, [*trackers]
    stage = Stage(config, master, attempt=attempt)
    stage.producer.faults.void = void_packs(stage.plan)
    return stage


def void_packs(plan: Plan) -> set[PackId]:
    return {pack.id for pack in plan.assign(2, 2)[1]}


def outcome(stage: Stage) -> Outcome:
    report = stage.report()
    void = sorted(pack for pack, _ in report.void)
    return Outcome(
        stage.metrics(), stage.state(stage.steps), stage.values(stage.steps), report.lost, void, report.phase
    )


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tiny_target: Path, master: Master) -> Outcome:
    with stage_at(folder, tiny_target, master, "undisturbed") as stage:
        stage.producer.faults.wrong_once = {stage.plan.packs(1)[0].id}
        assert stage.end() == 0, stage.tell()
        assert stage.deaths() == 0
        return outcome(stage)


@pytest.fixture(scope="module")
def together(folder: Path, tiny_target: Path, master: Master) -> Outcome:
    """Both ranks train every pack together."""
    with stage_at(folder, tiny_target, master, "together", together=2, record=2) as stage:
        assert stage.end() == 0, stage.tell()
        assert stage.deaths() == 0
        return outcome(stage)


def assert_same(outcome: Outcome, other: Outcome) -> None:
    """Weights, optimizer states, schedule, random generators and position, to the last bit, and what was reported."""
    assert without_times(outcome.lines) == without_times(other.lines)
    assert outcome.values == other.values
    assert outcome.state.keys() == other.state.keys()
    assert [name for name in other.state if not torch.equal(outcome.state[name], other.state[name])] == []


def test_each_step_is_trained_and_reported_once(undisturbed: Outcome) -> None:
    lines = undisturbed.lines
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert undisturbed.phase is Phase.TRAINED
    for line in lines:
        assert line["loss"] == pytest.approx(sum(0.8**k * loss for k, loss in enumerate(line["losses"])))
        assert all(0 <= share <= 1 for share in line["accuracy"])
        assert 0 <= line["wait_s"] <= line["seconds"]


def test_the_rate_rises_and_falls_as_configured(undisturbed: Outcome) -> None:
    warm = [1e-3, 2e-3, 3e-3]
    # torchtitan keeps the highest rate for one step more, and ends its cosine one step after the last.
    fall = [3e-3 * 0.5 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
    assert [line["learning_rate"] for line in undisturbed.lines] == pytest.approx(warm + fall)


def test_gradients_are_scaled_down_to_the_configured_norm(undisturbed: Outcome) -> None:
    """Each is reported as it was, and the optimizer's mean of them is of those that were scaled."""
    most, beta = 0.05, 0.9
    assert min(line["grad_norm"] for line in undisturbed.lines) > 1.5 * most
    means = [value.flatten() for name, value in undisturbed.state.items() if name.endswith(".exp_avg")]
    assert len(means) == 13
    assert 0 < torch.cat(means).norm() <= most * (1 - beta ** len(undisturbed.lines)) * (1 + 1e-5)


def test_a_pack_that_is_not_what_was_stored_is_computed_again(undisturbed: Outcome) -> None:
    assert undisturbed.lost == 1


def test_a_rank_with_nothing_to_learn_holds_up_nobody(undisturbed: Outcome) -> None:
    """The second rank's packs of step 2 are all void, and in step 8 it has none at all."""
    assert [line["void_packs"] for line in undisturbed.lines] == [0, 2, 0, 0, 0, 0, 0, 0]
    assert len(undisturbed.void) == 2


def test_evaluations_come_as_configured_and_after_the_last_step(undisturbed: Outcome) -> None:
    found = {line["step"]: line["evaluation"] for line in undisturbed.lines if "evaluation" in line}
    assert list(found) == [3, 6, 8]
    for evaluation in found.values():
        assert evaluation["packs"] == 3
        steps, drafts = sum(evaluation["accepted"]), sum(n * count for n, count in enumerate(evaluation["accepted"]))
        assert evaluation["acceptance_length"] == pytest.approx(1 + drafts / steps)
        assert evaluation["loss"] == pytest.approx(sum(0.8**k * loss for k, loss in enumerate(evaluation["losses"])))


def test_the_best_snapshot_is_kept_besides_the_newest_two(folder: Path, undisturbed: Outcome) -> None:
    found = {line["step"]: line["evaluation"] for line in undisturbed.lines if "evaluation" in line}
    best = max(found, key=lambda step: (found[step]["acceptance_length"], -found[step]["loss"], step))
    assert set(snapshots(folder / "undisturbed" / "snapshots")) == {6, 8, best}


@pytest.mark.parametrize("name", ["undisturbed", "together"])
def test_an_evaluation_is_what_its_snapshots_draft_gives(
    folder: Path, tiny_target: Path, request: pytest.FixtureRequest, name: str
) -> None:
    """Computed again here, all held-out samples as one pack each, with weights that were read from the snapshot."""
    found: Outcome = request.getfixturevalue(name)
    config = make_config(tiny_target, folder)
    config.run.dir = str(folder / name)
    run_dir = RunDir(folder / name)
    corpus, target = open_corpus(run_dir), read_target(tiny_target)
    algorithm = algorithm_of(config, target)
    plan, contract = make_plan(config, corpus), algorithm.contract
    draft = Eagle3Module(algorithm.settings(corpus))
    draft.initialize(0, embedding(target), lm_head(target))
    draft.load_state_dict({parameter: found.state[parameter] for parameter in draft.state_dict()})
    sums, counts, accepted = torch.zeros(2, 3), np.zeros(3, dtype=int), np.zeros(4, dtype=int)
    right = np.zeros(3, dtype=int)
    for pack in plan.heldout:
        for index in pack.samples:
            sample, rows = corpus.sample(index), PackRows.of(Pack(-1, 0, (index,)), corpus, contract)
            states = target_rows(corpus, contract, index)
            result, proposed = draft.evaluate(rows.tensors(states, torch.device("cpu")), torch.ones(3))
            greedy = np.full(len(sample.input_ids), -1)
            for row, position in zip(states["last"], contract.rows(sample.loss_mask)["last"], strict=True):
                greedy[position] = int((lm_head(target).float() @ row.float()).argmax())
            sums += result
            for k in range(3):
                right[k] += sum(proposed[k, i] == greedy[i + k] >= 0 for i in range(len(greedy) - k))
            counts += algorithm.counts(Masks.of([sample.loss_mask]))[:, 0]
            accepted += accepted_counts(proposed.numpy(), greedy, sample.loss_mask, 3)
    evaluation = found.lines[-1]["evaluation"]
    assert evaluation["losses"] == pytest.approx((sums[0].numpy() / counts).tolist(), rel=1e-5)
    assert evaluation["accuracy"] == pytest.approx((right / counts).tolist())
    assert (right <= sums[1].numpy()).all(), "of the draft's vocabulary alone, as many or more are right"
    assert (evaluation["accepted"], evaluation["loss_tokens"]) == (accepted.tolist(), int(counts[0]))


def test_training_goes_on_as_without_evaluations(
    folder: Path, tiny_target: Path, master: Master, undisturbed: Outcome
) -> None:
    config = make_config(tiny_target, folder)
    config.run.dir = str(folder / "not evaluated")
    config.training.evaluate_interval_steps = None
    with Stage(config, master) as stage:
        stage.producer.faults.void = void_packs(stage.plan)
        assert stage.end() == 0, stage.tell()
        plain = outcome(stage)
    assert_same(plain, replace(undisturbed, lines=[without_evaluation(line) for line in undisturbed.lines]))


def without_evaluation(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "evaluation"}


def test_one_rank_learns_what_two_do(folder: Path, tiny_target: Path, master: Master, undisturbed: Outcome) -> None:
    stage = stage_at(folder, tiny_target, master, "one rank", ranks=1, record=2)
    stage.run_dir.recordings.write_text("a file where the folder should be")
    with stage:
        assert stage.end() == 0, stage.tell()
        assert_close(outcome(stage), undisturbed)
        ((what, why),) = stage.report().troubles
    assert (what, why.split(":")[0]) == ("recording of rank 0", "step 8"), "what can't be recorded changes nothing"


def test_ranks_that_train_every_pack_together_learn_the_same(
    folder: Path, together: Outcome, undisturbed: Outcome
) -> None:
    assert_close(together, undisturbed)
    run_dir = RunDir(folder / "together")
    verdicts = replay(run_dir, start=6)
    assert [verdict["step"] for verdict in verdicts] == [7, 8]
    assert all(verdict["same"] and not verdict["packs"] for verdict in verdicts), "and again, from recordings"
    assert replay(run_dir, start=6, count=1, ranks=1)[0]["relative"] < 1e-6, "out of the parts of both"


def test_a_pack_that_one_of_its_ranks_can_not_get_trains_as_zero_on_all_of_them(
    folder: Path, tiny_target: Path, master: Master, undisturbed: Outcome
) -> None:
    """The first rank has its part of the packs, which a run without them trains as zero, too. So it is with a held-out
    pack."""
    with stage_at(folder, tiny_target, master, "one loses", together=2) as stage:
        faults, heldout = stage.producer.faults, stage.plan.heldout[0].id
        faults.void, faults.second_loses = set(), {heldout, *void_packs(stage.plan)}
        assert stage.end() == 0, stage.tell()
        assert stage.deaths() == 0
        found = outcome(stage)
        first, second = (stage.run_dir.component_log(1, "training", rank).read_text() for rank in range(2))
    evaluations = [line.pop("evaluation") for line in found.lines if "evaluation" in line]
    assert [evaluation["packs"] for evaluation in evaluations] == [2, 2, 2]
    assert_close(found, replace(undisturbed, lines=[without_evaluation(line) for line in undisturbed.lines]))
    assert found.void == [heldout, *undisturbed.void]
    assert f"void held-out pack={heldout[0]}.{heldout[1]} why=another rank of its group lacks it" in first
    for epoch, index in undisturbed.void:
        assert f"void pack={epoch}.{index} why=another rank of its group lacks it" in first
        assert f"void pack={epoch}.{index} why=lost {VOID_LOSSES} times" in second
    assert not re.search("lost (held-out )?pack=", first)


def assert_close(found: Outcome, other: Outcome) -> None:
    """Losses, gradients and weights, but for rounding, where packs fell on other ranks."""
    for line, expected in zip(found.lines, other.lines, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert {k: line[k] for k in ("tokens", "loss_tokens", "void_packs", "learning_rate")} == {
            k: expected[k] for k in ("tokens", "loss_tokens", "void_packs", "learning_rate")
        }
        if "evaluation" in expected:
            assert line["evaluation"]["loss"] == pytest.approx(expected["evaluation"]["loss"], rel=1e-6)
            assert line["evaluation"]["packs"] == expected["evaluation"]["packs"]
    weights = [
        name for name in found.state if "." in name and name.split(".")[0] in ("fc", "layers", "norm", "lm_head")
    ]
    assert len(weights) == 13
    for name in weights:
        # Adam makes much of a gradient that is almost zero.
        torch.testing.assert_close(found.state[name], other.state[name], rtol=1e-3, atol=1e-4)


def test_a_killed_rank_changes_nothing(folder: Path, tiny_target: Path, master: Master, undisturbed: Outcome) -> None:
    """Killed after step 5: both ranks go on from the snapshot of step 3, within the same attempt."""
    with stage_at(folder, tiny_target, master, "killed", trackers=["tensorboard", "wandb"]) as stage:
        stage.producer.last_step = 5
        stage.reach(5)
        before = stage.ranks()
        before[1].kill()
        stage.producer.last_step = 8
        assert stage.end() == 0, stage.tell()
        assert not any(rank.is_running() for rank in before)
        assert stage.deaths() == 1
        killed = outcome(stage)
        trackers = stage.run_dir.trackers
    assert_same(killed, undisturbed)
    assert in_tensorboard(trackers / "tensorboard") == [
        (line["step"], pytest.approx(line["loss"])) for line in undisturbed.lines
    ]
    assert in_wandb(trackers / "wandb") == [line["step"] for line in undisturbed.lines]


def test_a_signal_to_all_processes_ends_in_one_snapshot_and_changes_nothing(
    folder: Path, tiny_target: Path, master: Master, undisturbed: Outcome
) -> None:
    """Signal the agent and the ranks, as Slurm does; the agent must not end the ranks then."""
    with stage_at(folder, tiny_target, master, "drained") as stage:
        stage.producer.last_step = 4
        stage.reach(4)
        assert stage.agent is not None
        for pid in (stage.agent.pid, *(rank.pid for rank in stage.ranks())):
            os.kill(pid, signal.SIGTERM)
        assert stage.end() == 0, stage.tell()
        assert stage.deaths() == 0
        assert "SIGTERM" in stage.report().why
        assert stage.report().phase is Phase.STOP
        assert stage.values(4)["train_state.step"] == 4
    with stage_at(folder, tiny_target, master, "drained", attempt=2) as stage:
        assert stage.end() == 0, stage.tell()
        assert stage.deaths() == 0
        resumed = outcome(stage)
    assert_same(resumed, undisturbed)


def test_ranks_that_die_of_the_last_snapshot_train_the_steps_before_it_again(
    folder: Path, tiny_target: Path, master: Master, undisturbed: Outcome
) -> None:
    """Engines hear that all is trained only when the snapshot is on disk, so they still exist."""
    with stage_at(folder, tiny_target, master, "last") as stage:
        stage.producer.last_step = stage.steps - 1
        stage.reach(stage.steps - 1)
        for rank in stage.ranks():
            _, hard = rank.rlimit(psutil.RLIMIT_FSIZE)
            rank.rlimit(psutil.RLIMIT_FSIZE, (64 << 10, hard))
        stage.producer.last_step = stage.steps
        assert stage.end() == 0, stage.tell()
        assert stage.deaths() == 1
        assert "SNAPSHOT FAILED" in stage.run_dir.component_log(1, "training", 0).read_text()
        assert_same(outcome(stage), undisturbed)


def test_a_step_that_is_no_number_is_skipped_where_that_is_configured(
    folder: Path, tiny_target: Path, master: Master
) -> None:
    config = make_config(tiny_target, folder)
    config.run.dir, config.training.not_finite = str(folder / "skipped"), "skip"
    with Stage(config, master) as stage:
        broken = stage.plan.packs(5)[2]
        stage.producer.faults.nan = {broken.id}
        assert stage.end() == 0, stage.tell()
        assert stage.deaths() == 0
        lines = stage.metrics()
        assert [line["step"] for line in lines if "skipped" in line] == [5]
        samples = ", ".join(map(str, broken.samples))
        assert f"broken packs: 0.{broken.index} with the samples {samples}" in lines[4]["skipped"]
        assert lines[4]["loss"] is None
        state = stage.state(stage.steps)
        assert all(torch.isfinite(tensor).all() for tensor in state.values())
        assert {float(value) for name, value in state.items() if name.endswith(".step")} == {stage.steps - 1.0}


def test_what_would_fail_again_is_not_tried_again(folder: Path, tiny_target: Path, master: Master) -> None:
    """First a pack with states of NaN, then a snapshot of another training."""
    config = make_config(tiny_target, folder)
    config.run.dir = str(folder / "broken")
    with Stage(config, master) as stage:
        broken = stage.plan.packs(5)[2]
        stage.producer.faults.nan = {broken.id}
        assert stage.end() == 1, stage.tell()
        log = stage.run_dir.component_log(1, "agent", 0).read_text()
        samples = ", ".join(map(str, broken.samples))
        assert f"the loss of step 5 is not finite; broken packs: 0.{broken.index} with the samples {samples}" in log
        assert "restart=no" in log
        assert [line["step"] for line in stage.metrics()] == [1, 2, 3, 4]
    other = replace(config, draft=replace(config.draft, step_decay=0.7))
    stage.run_dir.config.write_text(dump_config(other), encoding="utf-8")
    with Stage(other, master, attempt=2) as stage:
        assert stage.end() == 1, stage.tell()
        log = stage.run_dir.component_log(2, "agent", 0).read_text()
        assert "UserError" in log
        assert "step_decay" in log
        assert "restart=no" in log
