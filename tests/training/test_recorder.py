"""The recorder of steps: whatever happens to the disk, the error is reported and training continues."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from specbatch.drafts.pack import WHOLE, PackTensors
from specbatch.plan import Pack
from specbatch.snapshot.recording import recorded_steps, step_folder
from specbatch.training.observers.recorder import Recorder

Told = list[tuple[str, str]]


@pytest.fixture
def full_disk() -> Iterator[Callable[[bool], None]]:
    """No file may grow longer than a recording, or any may. The kernel says "too large" in place of "no space"."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]) if full else limits)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def recorder_of(folder: Path, told: Told, *, rank: int = 0, ranks: int = 1) -> Recorder:
    return Recorder(
        folder, keep=2, rank=rank, ranks=ranks, share=WHOLE, tell=lambda what, why: told.append((what, why))
    )


def train(recorder: Recorder, step: int) -> None:
    """A step of one pack, as the trainer shows it."""
    rows = {"aux": torch.rand(8, 96), "last": torch.rand(7, 32)}
    tensors = PackTensors(torch.arange(9), torch.ones(9, dtype=torch.bool), (9,), rows)
    recorder.pack(Pack(0, step, (0,)), tensors, torch.rand(2, 3), {})
    recorder.step({"step": step})


def wait_for(seen: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not seen():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_full_disk_is_told_and_training_is_not_held_up(tmp_path: Path, full_disk: Callable[[bool], None]) -> None:
    told: Told = []
    recorder = recorder_of(tmp_path, told)
    recorder.start(0)
    train(recorder, 1)
    wait_for(lambda: recorded_steps(tmp_path) == [1])
    full_disk(True)
    for step in (2, 3, 4):
        train(recorder, step)
    wait_for(lambda: len(told) == 3)
    assert all(what == "recording of rank 0" and "File too large" in why for what, why in told)
    wait_for(lambda: not list(tmp_path.iterdir()))  # old steps make room, whether or not new ones can be written
    full_disk(False)
    for step in (5, 6):
        train(recorder, step)
    recorder.close()
    assert told[3:] == [("recording of rank 0", "")]
    assert recorded_steps(tmp_path) == [5, 6]


def test_a_folder_that_cannot_be_made_is_told_and_training_is_not_held_up(tmp_path: Path) -> None:
    (tmp_path / "recordings").write_text("a file where the folder should be")
    told: Told = []
    recorder = recorder_of(tmp_path / "recordings", told)
    recorder.start(0)
    for step in (1, 2, 3):
        train(recorder, step)
    recorder.close()
    assert len(told) == 3


def test_what_cannot_be_recorded_for_any_reason_is_told_and_training_is_not_held_up(tmp_path: Path) -> None:
    told: Told = []
    recorder = recorder_of(tmp_path, told)
    recorder.start(0)
    for step in (1, 2):
        recorder.step({"step": step, "loss": object()})  # which is no JSON
    train(recorder, 3)
    recorder.close()
    assert len(told) == 3
    assert told[-1] == ("recording of rank 0", "")
    assert recorded_steps(tmp_path) == [3]


def test_recordings_give_way_to_a_last_snapshot_and_training_is_not_held_up(tmp_path: Path) -> None:
    told: Told = []
    recorder = recorder_of(tmp_path, told)
    recorder.start(0)
    train(recorder, 1)
    recorder.give_way()
    assert not list(tmp_path.iterdir())
    assert told == [("recording of rank 0", "deleted, since the last snapshot had no room")]
    for step in (2, 3, 4):
        train(recorder, step)
    recorder.close()
    assert not list(tmp_path.iterdir())


def test_on_fewer_ranks_nothing_is_left_of_steps_that_are_trained_again(tmp_path: Path) -> None:
    for rank in range(4):
        recorder = recorder_of(tmp_path, [], rank=rank, ranks=4)
        recorder.start(0)
        for step in (1, 2, 3):
            train(recorder, step)
        recorder.close()
    (step_folder(tmp_path, 3) / ".rank-3.part").write_bytes(b"cut off")
    assert recorded_steps(tmp_path) == [2, 3]
    recorders = [recorder_of(tmp_path, [], rank=rank, ranks=2) for rank in (0, 1)]
    for recorder in recorders:
        recorder.start(2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    for step in (3, 4):
        for recorder in recorders:
            train(recorder, step)
    for recorder in recorders:
        recorder.close()
    assert recorded_steps(tmp_path) == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-4"]
