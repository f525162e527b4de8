"""Drafts that the command trains on recorded steps: stopped, killed and gone on with, the result is the same."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from specbatch.config import dump_config
from specbatch.corpus import attach, make_plan, open_corpus, prepare
from specbatch.dispatch.client import Client
from specbatch.dispatch.connection_file import wait_for
from specbatch.drafts.base import algorithm_of
from specbatch.errors import UserError
from specbatch.metrics_lines import last_step
from specbatch.recorded_plan import RecordingSource, recording_source
from specbatch.run.attempts import begin_attempt
from specbatch.run.change import change_settings
from specbatch.run.elastic_engine import join
from specbatch.run.exit_records import ExitRecord, write_exit_record
from specbatch.run.from_recording import begin
from specbatch.run.head import supervise
from specbatch.run.local import resume, train_on_recording
from specbatch.rundir import RunDir, write_json
from specbatch.snapshot.manifest import snapshot_path, whole_snapshots
from specbatch.snapshot.reading import read_tensors
from specbatch.snapshot.recording import RecordedPack, write_rank
from specbatch.status_file import read_status
from specbatch.target import read_target
from specbatch.training.feed.buffers import empty_pack
from specbatch.training.process.signals import DRAINING
from tests.training.stage import make_config, target_rows, without_times

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FIRST, COUNT, EPOCHS = 3, 6, 8


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> RunDir:
    """A run directory with recorded steps of two ranks: what a run would have left, but for what the steps gave."""
    config = make_config(tiny_target, tmp_path_factory.mktemp("recorded"))
    run_dir = RunDir(Path(config.run.dir))
    run_dir.make()
    run_dir.config.write_text(dump_config(config), encoding="utf-8")
    attach(run_dir, prepare(config))
    corpus = open_corpus(run_dir)
    plan, contract = make_plan(config, corpus), algorithm_of(config, read_target(config.target.path)).contract
    for step in range(FIRST, FIRST + COUNT):
        for rank, packs in enumerate(plan.assign(step, 2)):
            kept = []
            for pack in packs:
                samples = [corpus.sample(index) for index in pack.samples]
                rows = [target_rows(corpus, contract, index) for index in pack.samples]
                empty = empty_pack(contract, torch.device("cpu"))
                tensors = {
                    "input_ids": torch.cat([empty.input_ids, *(torch.from_numpy(s.input_ids).long() for s in samples)]),
                    "loss_mask": torch.cat([empty.loss_mask, *(torch.from_numpy(s.loss_mask) for s in samples)]),
                    **{name: torch.cat([none, *(row[name] for row in rows)]) for name, none in empty.rows.items()},
                }
                lengths = tuple(sample.input_ids.size for sample in samples)
                kept.append(RecordedPack(pack.id, pack.samples, lengths, "", tensors, torch.zeros(2, 3)))
            write_rank(run_dir.recordings, step, kept, {"step": step}, rank=rank, ranks=2, together=1)
    return run_dir


class Training:
    """One draft that is trained on recorded steps."""

    def __init__(self, recorded: RunDir, out: Path) -> None:
        self.run_dir = RunDir(out)
        self.words = ["replay", str(recorded.root), "--source", "recording", "--run.dir", str(out)]
        self.words += ["--training.epochs", str(EPOCHS), "--snapshot.interval", "7"]
        self.words += ["--run.stall_timeout_s", "300"]  # ranks take long to start on a busy machine

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "specbatch", *(words or self.words)]
        # A session of its own: what a terminal's Ctrl-C does is done by hand.
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def finish(self, *more: str) -> None:
        command = self.start(*self.words, *more)
        out, err = command.communicate(timeout=200)
        assert command.returncode == 0, err
        assert out.strip() == str(self.run_dir.export)

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.run_dir.metrics.read_text().splitlines()]

    def reach(self, step: int, command: subprocess.Popen[str]) -> None:
        until = time.monotonic() + 120
        while last_step(self.run_dir.metrics) < step:
            assert command.poll() is None, command.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)

    def status(self) -> dict[str, Any]:
        words = [sys.executable, "-m", "specbatch", "status", str(self.run_dir.root), "--json"]
        return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def undisturbed(recorded: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Training:
    made = Training(recorded, tmp_path_factory.mktemp("undisturbed") / "new")
    made.finish()
    assert [line["step"] for line in made.metrics()] == list(range(1, COUNT * EPOCHS + 1))
    return made


def test_a_new_draft_comes_out_the_same_whatever_its_training_went_through(
    recorded: RunDir, undisturbed: Training, tmp_path: Path
) -> None:
    disturbed = Training(recorded, tmp_path / "dis turbed")
    command = disturbed.start()
    disturbed.reach(9, command)
    # The few seconds that are left of the training would be over before a command has been started.
    ranks = [rank for rank in psutil.Process(command.pid).children(recursive=True) if _is_rank(rank)]
    assert len(ranks) == 2
    for rank in ranks:
        rank.suspend()
    until = time.monotonic() + 60
    # The head writes the status every two seconds at most.
    while (told := disturbed.status())["step"] == 0 and time.monotonic() < until:
        time.sleep(0.2)
    assert (told["state"], told["steps"], told["attempt"]) == ("running", COUNT * EPOCHS, 1)
    assert 0 < told["step"] < COUNT * EPOCHS
    command.send_signal(signal.SIGINT)
    time.sleep(2)
    for rank in ranks:
        rank.resume()
    out, err = command.communicate(timeout=60)
    assert command.returncode == 75, err
    told = disturbed.status()
    assert (told["state"], told["step"]) == ("stopped", len(disturbed.metrics()))
    assert f"stopped at step {told['step']}; continue with the same command, or: specbatch resume" in out
    assert whole_snapshots(disturbed.run_dir.snapshots)[-1] == told["step"]

    command = disturbed.start()
    # Between two snapshots, of which there is one every seven steps.
    disturbed.reach((told["step"] // 7 + 2) * 7 + 2, command)
    for process in [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]:
        process.kill()
    command.wait()
    told = disturbed.status()
    assert told["state"] == "gone"
    assert whole_snapshots(disturbed.run_dir.snapshots)[-1] < last_step(disturbed.run_dir.metrics)

    command = disturbed.start("resume", str(disturbed.run_dir.root), "--run.log_interval_s", "7")
    out, err = command.communicate(timeout=200)
    assert command.returncode == 0, err
    told = disturbed.status()
    assert (told["state"], told["step"], told["attempt"]) == ("completed", COUNT * EPOCHS, 3)
    assert without_times(disturbed.metrics()) == without_times(undisturbed.metrics())
    assert _end(disturbed) == _end(undisturbed)
    _is_told(recorded, disturbed.run_dir)


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "specbatch.training.process.rank" in process.cmdline()
    return False


def _is_told(recorded: RunDir, out: RunDir) -> None:
    """The origin of the draft, and the settings that were changed."""
    made_from = json.loads(out.provenance.read_text())
    assert made_from["recording"] == {"run": str(recorded.root), "first": FIRST, "count": COUNT}
    assert made_from["corpus_fingerprint"] == open_corpus(recorded).fingerprint
    assert made_from["plan"]["recorded"] == {"first": FIRST, "count": COUNT, "epochs": EPOCHS}
    (changed,) = made_from["changed"]
    assert changed["before_attempt"] == 3
    assert [(change["field"], change["now"]) for change in changed["changes"]] == [("run.log_interval_s", 7.0)]


def test_ranks_that_train_every_pack_together_learn_the_same(
    recorded: RunDir, undisturbed: Training, tmp_path: Path
) -> None:
    together = Training(recorded, tmp_path / "together")
    together.finish("--training.context_parallel", "2")
    for line, expected in zip(together.metrics(), undisturbed.metrics(), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def _end(training: Training) -> tuple[dict[str, bytes], bytes]:
    """The last snapshot's tensors and the draft, to the last bit."""
    tensors = read_tensors(snapshot_path(training.run_dir.snapshots, COUNT * EPOCHS))
    values = {name: tensor.flatten().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    return values, (training.run_dir.export / "model.safetensors").read_bytes()


def test_a_training_that_was_begun_goes_on_as_it_was_or_not_at_all(recorded: RunDir, tmp_path: Path) -> None:
    out = RunDir(tmp_path / "out")
    begin(recorded, out, ["--training.epochs", "2"])
    for field, value in (("training.learning_rate", "1"), ("training.epochs", "3")):
        with pytest.raises(UserError, match=rf"{field}: can't change when a run is resumed"):
            train_on_recording(recorded, out, ["--training.epochs", "2", f"--{field}", value])
    with pytest.raises(UserError, match=r"training\.packs_per_step: 4 can't be shared evenly by training\.ranks: 3"):
        resume(out.root, ["--training.ranks", "3"])
    with pytest.raises(UserError, match=r"snapshot\.record: recorded steps are not recorded again"):
        resume(out.root, ["--snapshot.record", "4"])
    config, _ = change_settings(out, ["--training.ranks", "1"])
    assert (config.training.epochs, config.training.ranks) == (2, 1)
    assert recording_source(out) == RecordingSource(str(recorded.root), FIRST, COUNT)
    with pytest.raises(UserError, match=r"run\.dir: .* is another run"):
        begin(out, recorded, [])
    with pytest.raises(UserError, match="it needs no engines"):
        join(out)
    write_json(out.recording, {"run": str(recorded.root), "first": 1, "count": 8})
    with pytest.raises(UserError, match=r"the recorded steps \[1, 2\], .* no longer exist"):
        resume(out.root)
    begin_attempt(out, 1, pid=os.getppid())
    for go_on in (lambda: train_on_recording(recorded, out, []), lambda: resume(out.root)):
        with pytest.raises(UserError, match=f"process {os.getppid()} on .* leads this run now"):
            go_on()


def test_a_head_without_engines_and_store_leads_ranks_to_the_last_step(
    recorded: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = RunDir(tmp_path / "out")
    begin(recorded, out, [])
    out.attempt(1).mkdir(parents=True)
    monkeypatch.setattr("specbatch.run.head.Master", None)
    monkeypatch.setattr("specbatch.transfer.store.StoreClient", None)

    def train() -> None:
        with contextlib.closing(Client(wait_for(out.rendezvous(1), 1, 30.0))) as client:
            client.join(0, 1, "", 0, 0)
            for step in range(1, COUNT + 1):
                assert client.begin(0, step).go
                client.trained(0, step)
        write_exit_record(out, 1, ExitRecord("training", 0))

    before = {number: signal.getsignal(number) for number in DRAINING}
    ranks = threading.Thread(target=train)
    ranks.start()
    supervise(out, 1, "127.0.0.1", training_nodes=1)
    ranks.join()
    for number, handler in before.items():
        signal.signal(number, handler)
    told = read_status(out.status)
    assert told is not None
    assert (told.state, told.step, told.steps, told.engines) == ("completed", COUNT, COUNT, ())
