#!/usr/bin/env python3
"""Measures the seconds of ``specbatch status`` with many run directories, including Python's start.

    python tools/bench/status.py [--runs 100] [--slurm]

With --slurm the runs have jobs, and the cluster that SLURM_CONF names is asked, as in daily use.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from specbatch.known_runs import register
from specbatch.run.attempts import begin_attempt
from specbatch.rundir import RunDir
from specbatch.slurm.jobs import record_job
from specbatch.status_file import EngineStatus, PackCounts, Status, StoreUse, write_status
from specbatch.timestamps import timestamp

STEPS = 2000
TIMES = 9


def make_run(root: Path, number: int, slurm: bool) -> None:
    """Make a run directory like that of a run of some hours: three attempts, thousands of steps, large logs."""
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(f"run:\n  dir: {root}\n  name: run-{number}\n  seed: 0\n" + "# padding\n" * 400)
    run_dir = RunDir(root)
    register(run_dir)
    engines = tuple(EngineStatus(f"engine-{n}-ab", "ready", 2, 9, 5.0, 0.1) for n in range(16))
    for attempt in (1, 2, 3):
        begin_attempt(run_dir, attempt, job=1000 + number if slurm else 0, restart=attempt - 1)
        status = Status(
            state="running", stage="training", step=STEPS, steps=2 * STEPS, attempt=attempt, updated=timestamp(),
            engines=engines, ranks=8, store=StoreUse(1, 2), window=PackCounts(1, 2, 3),
        )  # fmt: skip
        write_status(run_dir.status, status)
    if slurm:
        record_job(run_dir, 1000 + number, size=3)
    row = {"loss": 2.5, "losses": [2.5] * 7, "accuracy": [0.5] * 7, "tokens": 65536, "seconds": 2.0, "wait_s": 0.1}
    run_dir.metrics.write_text("".join(json.dumps({"step": step, **row}) + "\n" for step in range(1, STEPS + 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--slurm", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_STATE_HOME"] = f"{folder}/state"
        for number in range(options.runs):
            make_run(Path(folder) / "runs" / f"run-{number}", number, options.slurm)
        command = [sys.executable, "-m", "specbatch", "status"]
        bare = [timed([sys.executable, "-c", "pass"], folder)[0] for _ in range(TIMES)]
        took, computed = zip(*(timed(command, folder) for _ in range(TIMES)), strict=True)
        shown = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sum(line.startswith("run-") for line in shown) == options.runs, shown
    answer = shown[-1] if shown[-1].startswith("Slurm") else "Slurm answered" if options.slurm else "Slurm not asked"
    print(
        f"specbatch status, {options.runs} runs: median {statistics.median(took):.3f} s, most {max(took):.3f} s "
        f"of {TIMES}, of the processor {statistics.median(computed):.3f} s; "
        f"python alone {statistics.median(bare):.3f} s; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; "
        f"{answer}"
    )


def timed(command: list[str], folder: str) -> tuple[float, float]:
    """Return the seconds of a command, and the processor seconds of it and its children."""
    began, before = time.perf_counter(), os.times()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, used


if __name__ == "__main__":
    main()
