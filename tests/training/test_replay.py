"""Recorded steps of real ranks, trained again by the real trainer without dispatcher, store and engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specbatch.cli import main
from specbatch.errors import RunError, UserError
from specbatch.replay import replay
from specbatch.run.from_recording import begin
from specbatch.rundir import RunDir
from specbatch.snapshot.inspect import inspect
from specbatch.snapshot.recording import RecordedStep, recorded_steps
from tests.training.stage import Stage, make_config, store_master

pytestmark = [pytest.mark.light, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> RunDir:
    """Eight steps of two ranks, of which the last six are recorded; a pack of step 5 was void."""
    folder = tmp_path_factory.mktemp("a recorded run")
    config = make_config(tiny_target, folder)
    config.snapshot.record, config.snapshot.keep = 6, 5
    with store_master(folder) as master, Stage(config, master) as stage:
        stage.producer.faults.void = {stage.plan.packs(5)[0].id}
        assert stage.end() == 0, stage.tell()
    return stage.run_dir


def test_the_last_steps_are_recorded_with_what_they_gave(run: RunDir) -> None:
    assert recorded_steps(run.recordings) == [3, 4, 5, 6, 7, 8]
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    void = 0
    for step in recorded_steps(run.recordings):
        recorded = RecordedStep(run.recordings, step)
        assert recorded.line["loss"] == lines[step - 1]["loss"]
        packs = [recorded.read(told.id) for about in recorded.about.values() for told in about.packs]
        assert sum(float(pack.result[0].sum()) for pack in packs) == pytest.approx(lines[step - 1]["loss"])
        void += sum(bool(pack.void) for pack in packs)
        recorded.close()
    assert void == 1


def test_recorded_steps_come_out_the_same_to_the_last_bit(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    assert main(["replay", str(run.root), "--json"]) == 0
    verdicts = json.loads(capsys.readouterr().out)
    assert [verdict["step"] for verdict in verdicts] == [4, 5, 6, 7, 8]
    assert all(verdict["same"] and not verdict["packs"] for verdict in verdicts)
    assert {path: path.stat().st_mtime_ns for path in run.root.rglob("*")} == before, "the run is left as it was"


def test_on_another_number_of_ranks_the_difference_is_told(run: RunDir) -> None:
    verdicts = replay(run, start=6, count=1, ranks=1)
    assert [verdict["step"] for verdict in verdicts] == [7]
    assert verdicts[0]["relative"] < 1e-6


def test_a_new_draft_is_trained_on_what_was_recorded(run: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "new"
    options = ["--source", "recording", "--run.dir", str(out), "--training.epochs", "2", "--training.ranks", "1"]
    options += ["--run.stall_timeout_s", "300"]
    command = [sys.executable, "-m", "specbatch", "replay", str(run.root), *options, "--training.learning_rate", "1e-2"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == str(out / "export")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    recorded = [json.loads(line)["tokens"] for line in run.metrics.read_text().splitlines()[2:]]
    assert [line["tokens"] for line in lines] == recorded * 2
    assert lines[6]["loss"] < lines[0]["loss"], "the same packs again"
    assert (out / "export" / "model.safetensors").exists()


def test_what_is_not_there_is_the_users_mistake(run: RunDir, tmp_path: Path) -> None:
    for start, count, why in ((1, None, "no snapshot of step 1"), (6, 3, "2 recorded steps follow step 6")):
        with pytest.raises(UserError, match=why):
            replay(run, start, count)
    with pytest.raises(UserError, match=r"draft\.aux_layers: the recordings depend on it"):
        begin(run, RunDir(tmp_path / "x"), ["--draft.aux_layers", "[0, 1, 2]"])


def test_a_damaged_recording_is_refused_by_name(run: RunDir) -> None:
    file = run.recordings / "step-8" / "rank-0.h5"
    data = bytearray(file.read_bytes())
    recorded = RecordedStep(run.recordings, 8)
    pack = next(told.id for told in recorded.about[0].packs if told.lengths)
    values = recorded.read(pack).tensors["aux"]
    recorded.close()
    data[data.index(values.flatten().view(torch.uint8).numpy().tobytes())] ^= 1
    file.write_bytes(data)
    (found,) = (one for one in inspect(file.parent) if one.damage)
    assert "aux is not what was written" in found.damage[0]
    with pytest.raises(RunError, match=r"step-8/rank-0\.h5: .*aux is not what was written"):
        replay(run, start=6, count=2)
