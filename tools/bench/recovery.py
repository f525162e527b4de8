#!/usr/bin/env python3
"""Seconds that a run took to its first step, and after each interruption to the next new one, from its own files.

    python tools/bench/recovery.py RUN

One line per attempt. DRAIN: from what ended the previous attempt (the signal, or the last sign of life) to the end of
its head. QUEUE: until the next one began, which depends on Slurm; for the first attempt, from its submission. CHECK:
the check of all nodes before anything is loaded. LOAD: from an engine's first report to the first pack that it stored:
processes, model, first batch. TOTAL: all of it until the first step that had not been trained before. OWN: the total
without queue and load.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specbatch.metrics_lines import whole_lines
from specbatch.run.attempts import last_status, read_attempt
from specbatch.rundir import JOB_LOG, RunDir
from specbatch.slurm.jobs import read_jobs


@dataclass(frozen=True)
class Recovery:
    """Seconds until an attempt's first new step."""

    attempt: int
    cause: str
    drain_s: float
    queue_s: float
    check_s: float
    load_s: float
    total_s: float

    @property
    def own_s(self) -> float:
        """Seconds without the queue and the load of the model."""
        return self.total_s - self.queue_s - self.load_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    print(f"{'ATTEMPT':>7} {'DRAIN':>7} {'QUEUE':>7} {'CHECK':>7} {'LOAD':>7} {'TOTAL':>7} {'OWN':>7}  AFTER")
    for row in recoveries(RunDir(parser.parse_args().run.absolute())):
        times = [row.drain_s, row.queue_s, row.check_s, row.load_s, row.total_s, row.own_s]
        print(f"{row.attempt:7} {' '.join(f'{seconds:7.1f}' for seconds in times)}  {row.cause}")


def recoveries(run_dir: RunDir) -> list[Recovery]:
    """Return one for each attempt that trained a new step."""
    found, reached, checks = [], 0, checks_s(run_dir)
    for number in run_dir.attempts():
        attempt, events = read_attempt(run_dir, number), read_events(run_dir, number)
        new = next((event for event in events if event["event"] == "trained" and event["step"] > reached), None)
        if attempt is None or new is None:
            continue
        engine, stored = (
            next(seconds(event) for event in events if event["event"] == name) for name in ("engine", "stored")
        )
        struck, ended, cause = end_before(run_dir, number, attempt.job, attempt.began)
        check_s, load_s = checks.get(number, 0.0), stored - engine
        found.append(
            Recovery(number, cause, ended - struck, attempt.began - ended, check_s, load_s, seconds(new) - struck)
        )
        reached = max(event["step"] for event in events if event["event"] == "trained")
    return found


def end_before(run_dir: RunDir, number: int, job: int, began: float) -> tuple[float, float, str]:
    """Return when the previous attempt was interrupted, when its head ended, and why; for the first, its submission."""
    before = [other for other in run_dir.attempts() if other < number and run_dir.events(other).exists()]
    if not before:
        submitted = next((each.submitted for each in read_jobs(run_dir, "run") if each.id == job), began)
        return submitted, submitted, "submission"
    events, status = read_events(run_dir, before[-1]), last_status(run_dir, before[-1])
    drained = [event for event in events if event["event"] == "drain"]
    if drained and status is not None:
        struck = seconds(drained[0])
        # A head that was cut off has not written since.
        return struck, max(struck, seconds({"time": status.updated})), status.why or drained[0]["why"]
    return seconds(events[-1]), seconds(events[-1]), "its head was lost"


def checks_s(run_dir: RunDir) -> dict[int, float]:
    """Return how long each attempt checked its nodes, which its job's log says."""
    log = run_dir.root / JOB_LOG
    text = log.read_text(errors="replace") if log.exists() else ""
    return {
        int(number): float(s)
        for number, s in re.findall(r"attempt (\d+): checked all nodes in ([\d.]+) s$", text, re.M)
    }


def read_events(run_dir: RunDir, attempt: int) -> list[dict[str, Any]]:
    """Return the events of an attempt; none if its head did not get that far."""
    return [json.loads(line) for line in whole_lines(run_dir.events(attempt))]


def seconds(event: dict[str, Any]) -> float:
    """Return the time of an event in seconds since 1970."""
    return datetime.datetime.fromisoformat(event["time"]).timestamp()


if __name__ == "__main__":
    main()
