"""Each step once, whatever happened to the process that wrote it."""

from __future__ import annotations

import resource
from pathlib import Path

from specbatch.metrics_lines import last_step
from specbatch.training.observers.metrics_file import MetricsFile


def line(step: int) -> dict[str, object]:
    numbers = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 5, "seconds": 0.1, "wait_s": 0.0}
    return {"step": step, "accuracy": [None], **numbers}


def steps(path: Path) -> list[str]:
    return [text.split(",")[0] for text in path.read_text().splitlines()]


def test_steps_after_the_snapshot_are_cut_off_when_training_goes_on_from_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (1, 2, 3, 4):
        first.write(line(step))
    assert last_step(path) == 4
    MetricsFile(path, 2).write(line(3))
    assert steps(path) == ['{"step": 1', '{"step": 2', '{"step": 3']


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0).write(line(1))
    with path.open("a") as file:
        file.write('{"step": 2, "loss": 1.')
    assert last_step(path) == 1
    MetricsFile(path, 5).write(line(2))
    assert steps(path) == ['{"step": 1', '{"step": 2']


def test_a_run_that_starts_anew_forgets_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0).write(line(1))
    MetricsFile(path, 0)
    assert path.read_text() == ""
    assert last_step(path) == 0


def test_what_a_full_disk_has_no_room_for_is_written_when_it_has(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write(line(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
        file.write(line(2))
        file.write(line(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert last_step(path) == 1
    file.write(line(4))
    assert steps(path) == ['{"step": 1', '{"step": 2', '{"step": 3', '{"step": 4']
