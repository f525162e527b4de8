"""Real ranks of torchtitan under torch's elastic agent, fed by a real store, begun by a real dispatcher."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specbatch.config import dump_config
from specbatch.dispatch.messages import Phase
from specbatch.manifest import PackId
from specbatch.plan import Plan
from specbatch.transfer.master import Master
from tests.training.stage import Stage, make_config, store_master, without_times

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Outcome:
    """What a run left."""

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


def stage_at(folder: Path, target: Path, master: Master, name: str, *, ranks: int = 2, attempt: int = 1) -> Stage:
    """A run of its own, all on the same conversations. All of the second rank's packs of step 2 are void."""
    config = make_config(target, folder, ranks=ranks)
    config.run.dir = str(folder / name)
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


def test_a_pack_that_is_not_what_was_stored_is_computed_again(undisturbed: Outcome) -> None:
    assert undisturbed.lost == 1


def test_a_rank_with_nothing_to_learn_holds_up_nobody(undisturbed: Outcome) -> None:
    """The second rank's packs of step 2 are all void, and in step 8 it has none at all."""
    assert [line["void_packs"] for line in undisturbed.lines] == [0, 2, 0, 0, 0, 0, 0, 0]
    assert len(undisturbed.void) == 2


def test_one_rank_learns_what_two_do(folder: Path, tiny_target: Path, master: Master, undisturbed: Outcome) -> None:
    with stage_at(folder, tiny_target, master, "one rank", ranks=1) as stage:
        assert stage.end() == 0, stage.tell()
        alone = outcome(stage)
    for line, other in zip(alone.lines, undisturbed.lines, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert {k: line[k] for k in ("tokens", "loss_tokens", "void_packs", "learning_rate")} == {
            k: other[k] for k in ("tokens", "loss_tokens", "void_packs", "learning_rate")
        }
    weights = [
        name for name in alone.state if "." in name and name.split(".")[0] in ("fc", "layers", "norm", "lm_head")
    ]
    assert len(weights) == 13
    for name in weights:
        torch.testing.assert_close(alone.state[name], undisturbed.state[name], rtol=1e-4, atol=1e-6)


def test_a_killed_rank_changes_nothing(folder: Path, tiny_target: Path, master: Master, undisturbed: Outcome) -> None:
    """Killed after step 5: both ranks go on from the snapshot of step 3, within the same attempt."""
    with stage_at(folder, tiny_target, master, "killed") as stage:
        stage.producer.last_step = 5
        stage.reach(5)
        before = stage.ranks()
        before[1].kill()
        stage.producer.last_step = 8
        assert stage.end() == 0, stage.tell()
        assert not any(rank.is_running() for rank in before)
        assert stage.deaths() == 1
        killed = outcome(stage)
    assert_same(killed, undisturbed)


def test_a_signal_to_all_processes_ends_in_one_snapshot_and_changes_nothing(
    folder: Path, tiny_target: Path, master: Master, undisturbed: Outcome
) -> None:
    """As Slurm warns: the agent and the ranks, which then must not be ended by the agent."""
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


def test_what_would_fail_again_is_not_tried_again(folder: Path, tiny_target: Path, master: Master) -> None:
    """First a pack whose states are no numbers, then a snapshot of another training."""
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
