"""Trains recorded steps of a run again, to see whether the results are the same.

The ranks are torchtitan's, started by torch's agent on this machine, without engines, store and Slurm.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from specbatch.config import load_config
from specbatch.errors import UserError
from specbatch.rundir import RunDir
from specbatch.snapshot.manifest import whole_snapshots
from specbatch.snapshot.recording import RecordedStep, consecutive, recorded_steps
from specbatch.training.preflight import check_ranks
from specbatch.training.replay_rank import Order, log_path


def replay(
    run_dir: RunDir, start: int | None = None, count: int | None = None, ranks: int | None = None
) -> list[dict[str, Any]]:
    """Train recorded steps again.

    Args:
        start: step of the snapshot to begin with, 0 for the first weights. Default: the first snapshot that is followed
            by recorded steps.
        count: number of steps. Default: all that follow.
        ranks: trainer processes. Default: as many as recorded, which is required for the same losses. As many train a
            pack together as in the recording, if their number allows that, else one.

    Returns:
        for each step: ``step``, ``same`` (to the last bit), ``loss``, ``recorded`` (loss), ``apart``, ``relative``,
        ``different`` (names of metrics that differ), ``packs`` (packs of rank 0 whose results differ).

    Raises:
        UserError: there is no such snapshot or recording.
        RunError: training failed; with the log's last words.
    """
    first, count = _which(run_dir, start, count)
    recorded, together = _ranks(run_dir, first)
    ranks = ranks or recorded
    together = 1 if ranks % together else together
    config = load_config(run_dir.config)
    config.training.ranks, config.training.context_parallel = ranks, together
    check_ranks(config)
    with tempfile.TemporaryDirectory(prefix="specbatch-replay-") as folder:
        verdicts = Path(folder) / "verdicts.jsonl"
        order = Order(str(run_dir.root), folder, first, count, str(verdicts), together)
        _train(order, Path(folder), ranks)
        return [json.loads(line) for line in verdicts.read_text(encoding="utf-8").splitlines()]


def _which(run_dir: RunDir, start: int | None, count: int | None) -> tuple[int, int]:
    """Return the first recorded step to train, and the number of steps."""
    recorded, saved = recorded_steps(run_dir.recordings), [0, *whole_snapshots(run_dir.snapshots)]
    told = f"it has recordings of the steps {recorded or 'none'} and snapshots of the steps {saved[1:] or 'none'}"
    if start is None:
        start = next((step for step in saved if step + 1 in recorded), None)
        if start is None:
            raise UserError(f"{run_dir.root}: no recorded step follows a snapshot: {told}; see snapshot.record")
    if start not in saved:
        raise UserError(f"--from: there is no snapshot of step {start} in {run_dir.root}: {told}")
    most = consecutive(recorded, start + 1)
    if not most or (count or 1) > most:
        raise UserError(f"--steps: {most} recorded steps follow step {start} in {run_dir.root}: {told}")
    return start + 1, count or most


def _ranks(run_dir: RunDir, step: int) -> tuple[int, int]:
    """Return the number of ranks that trained a recorded step, and how many of them trained each pack together."""
    recorded = RecordedStep(run_dir.recordings, step)
    ranks, together = recorded.about[0].ranks, recorded.together
    recorded.close()
    return ranks, together


def _train(order: Order, folder: Path, ranks: int) -> None:
    """Run all ranks until they end.

    Args:
        folder: folder for the order.

    Raises:
        UserError: a rank reports what the user can mend.
        RunError: training failed; with the log's last words.
    """
    from specbatch.training.process.agent import explain, run_ranks
    from specbatch.training.process.rendezvous import OneNode

    path = folder / "order.json"
    path.write_bytes(msgspec.json.encode(order))
    result = run_ranks(["specbatch.training.replay_rank", str(path)], ranks, OneNode("replay"))
    if result.is_failed():
        explain(result, partial(log_path, folder), logs_stay=False)
