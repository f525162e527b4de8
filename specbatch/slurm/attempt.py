"""Leads an attempt in a job, called by its script:
``python -m specbatch.slurm.attempt begin|looked|again|end RUN ...``.

`begin` checks whether there is anything to do, and creates the attempt; `looked` ends it if a check of its nodes
(`specbatch.doctor.quick`) found that it can't work; `again` decides whether a component that ended is restarted; `end`
decides how the job ends, and so whether its successor continues. Standard output is for the script; messages for people
go to standard error, which is the run's ``job.log``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from specbatch.config import Config, load_config
from specbatch.errors import RunError, UserError
from specbatch.process_log import log_tail
from specbatch.run.answering import answers_first
from specbatch.run.attempts import begin_attempt, last_status, read_attempt
from specbatch.run.exit_records import ExitRecord, read_exit_record, write_exit_record
from specbatch.run.prepare import prepare, prepare_prompts
from specbatch.rundir import JOB_LOG, RunDir, write_json
from specbatch.slurm import commands
from specbatch.slurm.directives import job_name, requests
from specbatch.slurm.executor import unpack
from specbatch.slurm.jobs import Job, read_jobs, record_job
from specbatch.slurm.parts import component_count, parts_of
from specbatch.slurm.query import SlurmJobs, query_job, query_jobs
from specbatch.slurm.script import SCRIPT
from specbatch.slurm.states import ENDING, newest
from specbatch.slurm.steps import CANNOT_START
from specbatch.status_file import Status, is_complete, read_status, write_status
from specbatch.timestamps import timestamp

DONE, FAILED, NOTHING_TO_DO, TO_BE_CONTINUED = 0, 1, 3, 75
NOT_STARTED = (CANNOT_START, 127)
"""Exit codes of a component whose program did not start: those of bash and of the checks before it."""
LOOK_S = 30.0
"""Seconds that Slurm is asked how the previous job ended."""


def main(words: list[str]) -> int:
    """Handle one call of the script; return its exit code."""
    verb, root, *rest = words
    run_dir = RunDir(Path(root))
    try:
        config = load_config(run_dir.config)
        if verb == "begin":
            return begin(run_dir, config, int(os.environ["SLURM_JOB_ID"]))
        if verb == "again":
            attempt, component, starts, code = int(rest[0]), rest[1], int(rest[2]), int(rest[3])
            return DONE if again(run_dir, config, attempt, component, starts, code) else FAILED
        if verb == "looked":
            return looked(run_dir, int(rest[0]), int(os.environ["SLURM_JOB_ID"]), list(map(int, rest[1:])))
        return end(run_dir, config, int(rest[0]), int(os.environ["SLURM_JOB_ID"]), int(rest[1]))
    except (UserError, RunError) as error:
        _say(str(error))
        return FAILED


def begin(run_dir: RunDir, config: Config, job: int) -> int:
    """Create the next attempt and print its number.

    Returns:
        `NOTHING_TO_DO` if the run is complete or cancelled, `FAILED` if it can't continue, else `DONE`.
    """
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    _say(f"job {job}, restart {restart}, on {os.environ.get('SLURMD_NODENAME', 'an unknown node')}")
    record_job(run_dir, job, size=component_count(config))
    if (why := _nothing_to_do(run_dir, job)) or (why := no_progress(run_dir, config)):
        _say(why)
        return FAILED if why.startswith("failed") else NOTHING_TO_DO
    # Before anything that may fail, since repeated failures are counted by these folders.
    attempt = max(run_dir.attempts(), default=0) + 1
    run_dir.attempt(attempt).mkdir(parents=True, mode=0o700)
    if config.slurm.recovery == "chain":
        _submit_successor(run_dir, config, job, attempt + 1)
    try:
        if config.run.goal == "answers" or answers_first(run_dir, config):
            prepare_prompts(run_dir, config)
        else:
            prepare(run_dir, config, lambda *_: None, _say)
        unpack(run_dir, config, job)
    except (UserError, PermissionError, FileNotFoundError) as error:
        # The next job would fail in the same way.
        refuse(run_dir, attempt, str(error))
        _drop_successor(run_dir, job)
        raise UserError(str(error)) from error
    begin_attempt(run_dir, attempt, job=job, restart=restart, nodes=component_nodes(config), pid=os.getppid())
    _say(f"attempt {attempt} begins")
    print(attempt)
    return DONE


def looked(run_dir: RunDir, attempt: int, job: int, codes: list[int]) -> int:
    """End an attempt for good, before its components start, if the check of its nodes failed.

    Args:
        codes: exit codes of the check on the nodes of head, inference and training, as far as they exist.

    Returns:
        `FAILED`, or `DONE` if no permanent problem was found.
    """
    for component, code in zip(("head", "inference", "training"), codes, strict=False):
        left = sorted(run_dir.ended(attempt, component, 0).parent.glob(f"{component}-*.json"))
        records = [read_exit_record(run_dir, attempt, component, int(path.stem.rpartition("-")[2])) for path in left]
        why = next((record.why for record in records if record is not None), "")
        why = why or (why_not_started(run_dir, component, code) if code in NOT_STARTED else "")
        if why:
            refuse(run_dir, attempt, f"{component}: {why}")
            _drop_successor(run_dir, job)
            _say(f"attempt {attempt} can't work: {component}: {why}")
            return FAILED
        if code:
            _say(f"warning: the check of the nodes of {component} ended with exit code {code}")
    return DONE


def again(run_dir: RunDir, config: Config, attempt: int, component: str, starts: int, code: int = 0) -> bool:
    """Return whether to restart a component whose step ended: if its tasks ended without a record.

    If they are not restarted, records are written for them.

    Args:
        starts: number of restarts so far.
        code: exit code of its step; with one of `NOT_STARTED` it will never start.
    """
    part = next(part for part in parts_of(config) if part.name == component)
    gone = [task for task in range(part.tasks) if read_exit_record(run_dir, attempt, component, task) is None]
    status = read_status(run_dir.status) or Status()
    over = read_exit_record(run_dir, attempt, "head", 0) is not None or status.state == "stopping"
    if not gone or over or max(run_dir.attempts()) != attempt:
        return False
    if code in NOT_STARTED:
        why = why_not_started(run_dir, component, code)
        for task in gone:
            write_exit_record(run_dir, attempt, ExitRecord(component, task, why))
        return False
    most = config.training.max_restarts if component == "training" else config.inference.max_restarts
    # A task that still runs would be started twice, so only a step that ended as a whole can be restarted.
    if starts < most and len(gone) == part.tasks:
        _say(f"{component} was killed and is restarted")
        return True
    why = f"was killed {starts + 1} times"
    for task in gone:
        write_exit_record(run_dir, attempt, ExitRecord(component, task, why, again=True))
    return False


def why_not_started(run_dir: RunDir, component: str, code: int) -> str:
    """Return why a component's program did not start, as bash or a check before it wrote into ``job.log``."""
    said = [line for line in log_tail(run_dir.root / JOB_LOG, 200) if line.startswith(f"{component}: ")]
    words = said[-1].removeprefix(f"{component}: ") if said else "its program can't be run"
    return f"could not be started: {re.sub(r'^line [0-9]+: ', '', words)} (exit code {code})"


def end(run_dir: RunDir, config: Config, attempt: int, job: int, code: int = 0) -> int:
    """Report how the attempt ended, and requeue or submit what has to follow.

    Args:
        code: exit code of the head's step.

    Returns:
        the job's exit code: its successor starts only if that is not 0.
    """
    if run_dir.superseded(attempt):
        # This node was cut off and returned. The job that waited for this one leads the later attempt.
        _say(f"attempt {attempt} ended; attempt {attempt + 1} has taken over")
        return FAILED
    status = read_status(run_dir.status)
    if status is not None and status.attempt != attempt:
        status = None
    head = read_exit_record(run_dir, attempt, "head", 0)
    if head is None and code in NOT_STARTED:
        head = ExitRecord("head", 0, why_not_started(run_dir, "head", code))
        write_exit_record(run_dir, attempt, head)
    final = head is not None and head.failed and not head.again
    if status is None and final and head is not None:
        # It ended before it could write a status.
        status = refuse(run_dir, attempt, f"head: {head.why}")
    _say(f"attempt {attempt} ended: {f'{status.state} {status.why}'.rstrip() if status else 'its head was lost'}")
    if (status and status.state == "completed") or final or run_dir.cancelled.exists():
        _drop_successor(run_dir, job)
        return FAILED if final else DONE
    began = read_attempt(run_dir, attempt)
    if began is not None and not began.job:
        # An allocation is its user's, who goes on in it, or not.
        return TO_BE_CONTINUED
    if config.slurm.recovery == "requeue" and cancelled_now(job, query_jobs([job], [os.getuid()], LOOK_S)):
        # Requeueing would revive a cancelled job.
        _say(f"job {job} was cancelled from outside, and is not requeued")
        return TO_BE_CONTINUED
    if config.slurm.recovery == "requeue" and not no_progress(run_dir, config):
        commands.scontrol("requeue", str(job))
        time.sleep(LOOK_S)  # until Slurm ends the script: a script that ends by itself counts as complete
    return TO_BE_CONTINUED


def _nothing_to_do(run_dir: RunDir, job: int) -> str:
    """Return why there is nothing to do; empty if there is something."""
    if is_complete(run_dir):
        return "the run is complete"
    if run_dir.cancelled.exists():
        return "the run is cancelled; `specbatch resume` continues it"
    # Only a job that waited for another checks how that ended: any other job means that its user wants to continue.
    before = next((each.after for each in read_jobs(run_dir, "run") if each.id == job), 0)
    if before and _was_cancelled(before):
        write_json(run_dir.cancelled, {"why": f"job {before} was cancelled", "time": time.time()})
        return f"job {before} was cancelled, and so is the run; `specbatch resume` continues it"
    return ""


def cancelled_now(job: int, answer: SlurmJobs) -> bool:
    """Return whether a job that is ending was cancelled.

    Until all of it has ended, only the accounting knows. Without accounting, a job that Slurm ends before its time
    limit counts as cancelled: Slurm itself requeues jobs that should return from such an end.
    """
    past = [row for row in newest(answer.past.get(job, [])) if row.index == 0]
    if past:
        return past[0].state == "CANCELLED"
    now = answer.queue.get(job, [])
    return bool(now) and all(row.state == ENDING and row.reason != "TimeLimit" for row in now)


def _was_cancelled(job: int) -> bool:
    """Return whether a job was cancelled, as far as Slurm remembers."""
    answer = query_jobs([job], [os.getuid()], LOOK_S)
    rows = query_job(job, LOOK_S) or [*answer.past.get(job, []), *answer.queue.get(job, [])]
    return any(row.state.startswith("CANCELLED") for row in rows if row.index == 0)


def no_progress(run_dir: RunDir, config: Config) -> str:
    """Return why the run should end: too many attempts in a row failed without progress; empty if it should
    continue."""
    best, fruitless, why = (0, 0), 0, ""
    for number in run_dir.attempts():
        status = last_status(run_dir, number) or Status()
        # Prompts are answered before the first step.
        reached = status.step, status.answers.done if status.answers else 0
        if reached > best or status.state == "stopped":
            best, fruitless = max(best, reached), 0
        else:
            fruitless, why = fruitless + 1, status.why or "its head was lost"
    if fruitless <= config.run.max_restarts:
        return ""
    text = f"failed {fruitless} times in a row without progress by a step, the last time: {why}"
    refuse(run_dir, max(run_dir.attempts()), text)
    return text


def refuse(run_dir: RunDir, attempt: int, why: str) -> Status:
    """Write into the run's status why it ended, as the head would; return the status.

    Args:
        attempt: number of the attempt; 0 before the first one.
    """
    before = read_status(run_dir.status) or Status()
    told = {"state": "failed", "stage": "done", "attempt": attempt, "why": why, "updated": timestamp()}
    status = msgspec.structs.replace(before, **told)
    write_status(run_dir.status, status)
    return status


def _submit_successor(run_dir: RunDir, config: Config, job: int, attempt: int) -> None:
    """Submit the job that continues if this one ends early, for whatever reason; Slurm holds it until then."""
    name = str(next(iter(requests(config).values())).get("job-name") or job_name(config))
    options = [f"--dependency=afternotok:{job}", "--kill-on-invalid-dep=yes", f"--job-name={name}-{attempt}"]
    try:
        successor = commands.submit(run_dir.root / SCRIPT, options)
    except (UserError, RunError) as error:
        _say(f"warning: no successor: if this job ends early, the run stops there: {error}")
        return
    record_job(run_dir, successor, size=component_count(config), after=job)
    _say(f"job {successor} will continue if this one ends early")


def _drop_successor(run_dir: RunDir, job: int) -> None:
    for successor in _successors(run_dir, job):
        commands.scancel(str(successor.id))


def _successors(run_dir: RunDir, job: int) -> list[Job]:
    return [other for other in read_jobs(run_dir, "run") if other.after == job]


def component_nodes(config: Config) -> dict[str, list[str]]:
    """Return the names of each component's nodes, from Slurm's variables."""
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
