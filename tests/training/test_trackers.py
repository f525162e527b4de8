"""TensorBoard and Weights & Biases, the real packages, offline: each step once, whatever happened to the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specbatch.metrics_lines import MetricsLine
from specbatch.rundir import RunDir, read_json
from specbatch.training.observers.tracked import scalars, sync_command

KEY = "0123456789abcdef0123456789abcdef01234567"
RANKS = """
import json, os, sys, time
from pathlib import Path
from specbatch.training import cpu
from specbatch.rundir import RunDir
from specbatch.training.observers import trackers as module
from specbatch.training.observers.metrics_file import MetricsFile

module.READ_EVERY_S = 0.1
for root, first, last, end, variables in json.loads(sys.argv[1]):
    os.environ |= variables
    run_dir, told = RunDir(Path(root)), []
    file = MetricsFile(run_dir.metrics, first - 1)
    made = module.Trackers(
        ["tensorboard", "wandb"], run_dir, name="a run", config={"draft": {"algorithm": "eagle3"}},
        tell=lambda what, why: told.append((what, why)),
    )
    made.start()
    began = time.monotonic()
    for step in range(first, last + 1):
        line = {"step": step, "loss": 10.0 / step, "terms": ["step 1"], "losses": [1.0], "accuracy": [0.5]}
        numbers = dict.fromkeys(["grad_norm", "learning_rate", "seconds", "wait_s"], 1.0)
        file.write(line | numbers | {"tokens": 1})
        made.log({}, step)
    logged = time.monotonic() - began
    if end == "kill":
        while len([*run_dir.trackers.glob("wandb/offline-run-*/*.wandb")]) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), 9)
    module.CLOSE_S = end
    began = time.monotonic()
    made.close()
    print(json.dumps({"logged": logged, "closed": time.monotonic() - began, "told": told}), flush=True)
    if not told:
        sys.modules["wandb"].teardown()  # else it keeps the variables that it read first
os._exit(0)
"""


def ranks(*attempts: tuple[Path, int, int, float | str, dict[str, str]]) -> list[dict[str, Any]]:
    """Output of a process that trains one attempt after the other, until it is killed.

    Args:
        attempts: of each the run, its first and last step, seconds for the trackers to end or `kill`, and variables.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "-c", RANKS, json.dumps(attempts, default=str)]
    done = subprocess.run(
        command, env=environment | {"WANDB_API_KEY": KEY}, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == (-9 if "kill" in attempts[-1] else 0), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def in_tensorboard(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def in_wandb(folder: Path) -> list[int]:
    """Steps in all offline folders, in the order of their names."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps = []
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        for record in records(path.read_bytes()):
            told = Record.FromString(record).history
            steps += [int(item.value_json) for item in told.item if "_step" in (item.key, *item.nested_key)]
    return steps


def records(data: bytes, block: int = 32768) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: 7 bytes of checksum, length and kind, then the bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.mark.light
def test_each_step_is_in_both_trackers_once_and_a_tracker_that_fails_holds_nothing_up(tmp_path: Path) -> None:
    run_dir, other = RunDir(tmp_path / "a run"), RunDir(tmp_path / "other")
    run_dir.root.mkdir()
    tensorboard, wandb = run_dir.trackers / "tensorboard", run_dir.trackers / "wandb"
    # The first attempt ends after a snapshot of step 4, the second goes on from it, and is killed after that of step 8.
    [first] = ranks((run_dir.root, 1, 6, 20.0, {}), (run_dir.root, 5, 9, "kill", {}))
    assert first["told"] == []
    # TensorBoard cannot write here, and Weights & Biases has no network and tries for long.
    other.trackers.mkdir(parents=True)
    (other.trackers / "tensorboard").write_text("a file")
    online = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "60"}
    last, failed = ranks((run_dir.root, 9, 12, 20.0, {}), (other.root, 1, 3, 1.0, online))

    assert last["told"] == []
    assert in_tensorboard(tensorboard) == [(step, pytest.approx(10 / step)) for step in range(1, 13)]
    assert in_wandb(wandb) == list(range(1, 13))
    folders, kept = (
        sorted(path.name for path in wandb.glob("offline-run-*")),
        read_json(run_dir.trackers / "wandb.json"),
    )
    assert len(folders) == 2
    assert kept["whole"] == folders
    assert {name.rsplit("-", 1)[1] for name in folders} == {kept["id"]}
    assert sync_command(run_dir) == f"wandb sync '{wandb}'/offline-run-*"
    for path in run_dir.trackers.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()

    assert failed["logged"] < 1
    assert failed["closed"] < 3
    assert sorted(what for what, _ in failed["told"]) == ["tracker tensorboard", "tracker wandb"]
    assert dict(failed["told"])["tracker wandb"] == "it did not end within 1 s"


def test_what_is_null_is_left_out_of_what_trackers_are_told() -> None:
    line = MetricsLine(
        step=3, loss=2.0, terms=["a", "b"], losses=[1.0, None], accuracy=[0.5, None], tokens=7,
        evaluation={"loss": 3.0, "accuracy": [0.25, None], "acceptance_length": None},
    )  # fmt: skip
    found = scalars(line)
    assert {name: value for name, value in found.items() if value} == {
        "loss": 2.0, "loss/a": 1.0, "accuracy/a": 0.5, "heldout/loss": 3.0, "heldout/accuracy/a": 0.25
    }  # fmt: skip
    assert not {"loss/b", "accuracy/b", "grad_norm", "heldout/acceptance_length"} & set(found)


def test_nothing_is_to_be_sent_where_nothing_was_kept(tmp_path: Path) -> None:
    assert sync_command(RunDir(tmp_path)) == ""
