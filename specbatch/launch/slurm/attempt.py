"""An attempt in a job, as its script calls it: ``python -m specbatch.launch.slurm.attempt begin|again|end RUN ...``.

`begin` finds out whether there is anything to do and makes the attempt; `again` says whether a component that ended
is to be started again; `end` says how the job ends, and so whether its successor goes on. Standard output is for the
script, words for people go to standard error, which is the run's ``job.log``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from specbatch.config import Config, load_config
from specbatch.errors import RunError, UserError
from specbatch.launch.history import begin_attempt, last_status
from specbatch.launch.marks import Mark, leave_mark, read_mark
from specbatch.launch.prepare import prepare
from specbatch.launch.slurm import commands
from specbatch.launch.slurm.ask import Answer, ask, ask_closely
from specbatch.launch.slurm.executor import unpack
from specbatch.launch.slurm.jobs import Job, read_jobs, record_job
from specbatch.launch.slurm.script import SCRIPT, parts_of, size
from specbatch.launch.slurm.states import ENDING, newest
from specbatch.rundir import RunDir, read_json, write_json

DONE, FAILED, NOTHING_TO_DO, TO_BE_CONTINUED = 0, 1, 3, 75
LOOK_S = 30.0
"""How long Slurm is asked how the job before ended."""


def main(words: list[str]) -> int:
    """One call of the script; returns its exit code."""
    verb, root, *rest = words
    run_dir = RunDir(Path(root))
    try:
        config = load_config(run_dir.config)
        if verb == "begin":
            return begin(run_dir, config, int(os.environ["SLURM_JOB_ID"]))
        if verb == "again":
            return DONE if again(run_dir, config, int(rest[0]), rest[1], int(rest[2])) else FAILED
        return end(run_dir, config, int(rest[0]), int(os.environ["SLURM_JOB_ID"]))
    except (UserError, RunError) as error:
        _say(str(error))
        return FAILED


def begin(run_dir: RunDir, config: Config, job: int) -> int:
    """Make the next attempt and print its number.

    Returns:
        `NOTHING_TO_DO` if the run is complete or cancelled, `FAILED` if it can't go on, else `DONE`.
    """
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    _say(f"job {job}, restart {restart}, on {os.environ.get('SLURMD_NODENAME', 'an unknown node')}")
    record_job(run_dir, job, size=size(config))
    if (why := _nothing_to_do(run_dir, job)) or (why := no_progress(run_dir, config)):
        _say(why)
        return FAILED if why.startswith("failed") else NOTHING_TO_DO
    # Before anything that may fail: what fails again and again is counted by this folder.
    attempt = max(run_dir.attempts(), default=0) + 1
    run_dir.attempt(attempt).mkdir(parents=True, mode=0o700)
    if config.slurm.recovery == "chain":
        _submit_successor(run_dir, config, job)
    try:
        prepare(run_dir, config, lambda *_: None, _say)
        unpack(run_dir, config, job)
    except UserError as error:
        _refuse(run_dir, attempt, str(error))
        _drop_successor(run_dir, job)
        raise
    begin_attempt(run_dir, attempt, job=job, restart=restart, nodes=_nodes(config), pid=os.getppid())
    _say(f"attempt {attempt} begins")
    print(attempt)
    return DONE


def again(run_dir: RunDir, config: Config, attempt: int, component: str, starts: int) -> bool:
    """Whether a component whose step ended is to be started again: if tasks of it ended without a mark.

    When that is not to be, marks are left in their name.
    """
    part = next(part for part in parts_of(config) if part.name == component)
    gone = [task for task in range(part.tasks) if read_mark(run_dir, attempt, component, task) is None]
    status = read_json(run_dir.status) or {}
    over = read_mark(run_dir, attempt, "head", 0) is not None or status.get("state") == "stopping"
    if not gone or over or max(run_dir.attempts()) != attempt:
        return False
    most = config.training.max_restarts if component == "training" else config.inference.max_restarts
    # One task that is left would be started twice: only a step that ended as a whole can be started again.
    if starts < most and len(gone) == part.tasks:
        _say(f"{component} ended without a word and is started again")
        return True
    why = f"ended without a word, {starts + 1} times"
    for task in gone:
        leave_mark(run_dir, attempt, Mark(component, task, why, again=True))
    return False


def end(run_dir: RunDir, config: Config, attempt: int, job: int) -> int:
    """Say how the attempt ended, and bring about what follows from it.

    Returns:
        the job's exit code: its successor waits for one that is not 0.
    """
    if run_dir.superseded(attempt):
        # This node was cut off and is back. The job that waited for this one is the later attempt.
        _say(f"attempt {attempt} ended; attempt {attempt + 1} has taken over")
        return FAILED
    status = read_json(run_dir.status) or {}
    state = status.get("state") if status.get("attempt") == attempt else None
    head = read_mark(run_dir, attempt, "head", 0)
    final = head is not None and head.failed and not head.again
    _say(f"attempt {attempt} ended: {state or 'its head was lost'} {status.get('why', '')}".rstrip())
    if state == "completed" or final or run_dir.cancelled.exists():
        _drop_successor(run_dir, job)
        return FAILED if final else DONE
    if config.slurm.recovery == "requeue" and cancelled_now(job, ask([job], [os.getuid()], LOOK_S)):
        # Requeued, a cancelled job would be back from its end.
        _say(f"job {job} was ended by somebody, and is not requeued from here")
        return TO_BE_CONTINUED
    if config.slurm.recovery == "requeue" and not no_progress(run_dir, config):
        commands.scontrol("requeue", str(job))
        time.sleep(LOOK_S)  # Slurm ends the script; what ends by itself counts as complete and is not started again
    return TO_BE_CONTINUED


def _nothing_to_do(run_dir: RunDir, job: int) -> str:
    """Why there is nothing to do; empty if there is."""
    if (read_json(run_dir.status) or {}).get("state") == "completed":
        return "the run is complete"
    if run_dir.cancelled.exists():
        return "the run is cancelled; `specbatch resume` goes on with it"
    # Only who waited for a job's end asks how it came: any other job is somebody's wish to go on.
    before = next((each.after for each in read_jobs(run_dir, "run") if each.id == job), 0)
    if before and _was_cancelled(before):
        write_json(run_dir.cancelled, {"why": f"job {before} was cancelled", "time": time.time()})
        return f"job {before} was cancelled, and so is the run; `specbatch resume` goes on with it"
    return ""


def cancelled_now(job: int, answer: Answer) -> bool:
    """Whether a job that is ending was cancelled.

    Until all of it has ended, only the accounts know. Where none are kept, a job that Slurm ends before its time limit
    is taken for cancelled: what is to come back from such an end, Slurm requeues itself.
    """
    past = [row for row in newest(answer.past.get(job, [])) if row.index == 0]
    if past:
        return past[0].state == "CANCELLED"
    now = answer.queue.get(job, [])
    return bool(now) and all(row.state == ENDING and row.reason != "TimeLimit" for row in now)


def _was_cancelled(job: int) -> bool:
    """Whether somebody cancelled a job, as far as Slurm remembers."""
    answer = ask([job], [os.getuid()], LOOK_S)
    rows = ask_closely(job, LOOK_S) or [*answer.past.get(job, []), *answer.queue.get(job, [])]
    return any(row.state.startswith("CANCELLED") for row in rows if row.index == 0)


def no_progress(run_dir: RunDir, config: Config) -> str:
    """Why it is no use to go on: too many attempts in a row failed and trained nothing; empty if it may be."""
    best, fruitless, why = 0, 0, ""
    for number in run_dir.attempts():
        status: dict[str, Any] = last_status(run_dir, number) or {}
        reached = status.get("step", 0)
        if reached > best or status.get("state") == "stopped":
            best, fruitless = max(best, reached), 0
        else:
            fruitless, why = fruitless + 1, status.get("why") or "its head was lost"
    if fruitless <= config.run.max_restarts:
        return ""
    text = f"failed {fruitless} times in a row without a step of progress, at last: {why}"
    _refuse(run_dir, max(run_dir.attempts()), text)
    return text


def _refuse(run_dir: RunDir, attempt: int, why: str) -> None:
    """Have the run's status say why it ended, as the head would."""
    status = read_json(run_dir.status) or {"step": 0, "steps": 0, "waiting": [], "void": []}
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    write_json(
        run_dir.status, status | {"state": "failed", "stage": "done", "attempt": attempt, "why": why, "updated": now}
    )


def _submit_successor(run_dir: RunDir, config: Config, job: int) -> None:
    """The job that goes on if this one ends early, in whatever way: Slurm holds it back until then."""
    options = [f"--dependency=afternotok:{job}", "--kill-on-invalid-dep=yes"]
    try:
        successor = commands.submit(run_dir.root / SCRIPT, options)
    except (UserError, RunError) as error:
        _say(f"warning: no successor: when this job ends early, the run stays where it is: {error}")
        return
    record_job(run_dir, successor, size=size(config), after=job)
    _say(f"job {successor} will go on if this one ends early")


def _drop_successor(run_dir: RunDir, job: int) -> None:
    for successor in _successors(run_dir, job):
        commands.scancel(str(successor.id))


def _successors(run_dir: RunDir, job: int) -> list[Job]:
    return [other for other in read_jobs(run_dir, "run") if other.after == job]


def _nodes(config: Config) -> dict[str, list[str]]:
    """Names of each component's nodes, as Slurm's variables have them."""
    found: dict[str, list[str]] = {}
    for part in parts_of(config):
        options = dict(word.removeprefix("--").partition("=")[::2] for word in part.where.split())
        group = options.get("het-group")
        listed = os.environ.get(f"SLURM_JOB_NODELIST_HET_GROUP_{group}" if group else "SLURM_JOB_NODELIST", "")
        first = int(options.get("relative", 0))
        found[part.name] = _expand(listed)[first : first + part.nodes]
    return found


def _expand(listed: str) -> list[str]:
    ran = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=False)
    return ran.stdout.split()


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} specbatch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
