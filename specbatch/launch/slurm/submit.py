"""Submit a run: what can be known is checked before anything is written, and all is written before it is queued.

Nothing heavy is done here: of the data only the first rows are looked at, and the first attempt prepares them. A
submission that nobody knows the outcome of is looked for before there is another.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from specbatch.config import Config, dump_config, load_config
from specbatch.config.change import STEPS
from specbatch.errors import UserError
from specbatch.launch.change import change_settings
from specbatch.launch.slurm import commands
from specbatch.launch.slurm.cluster import read_cluster
from specbatch.launch.slurm.fit import check_fit
from specbatch.launch.slurm.jobs import read_jobs, record_job
from specbatch.launch.slurm.places import check_places
from specbatch.launch.slurm.script import SCRIPT, render, size
from specbatch.launch.slurm.shape import check_shape
from specbatch.launch.slurm.states import SQUEUE_FORMAT, Condition, JobState, job_state, parse_squeue
from specbatch.registry import register
from specbatch.rundir import RunDir, read_json, write_json, write_whole

Say = Callable[[str], None]


def resolved(config: Config) -> Config:
    """What the run directory holds: complete without the profile, which may change, and with the account that the
    shell names (``SBATCH_ACCOUNT``), as sites advise."""
    account = config.slurm.account or os.environ.get("SBATCH_ACCOUNT", "")
    return replace(config, slurm=replace(config.slurm, profile="", account=account))


def script_of(config: Config, warn: Say) -> str:
    """The script, checked as far as that goes without Slurm; nothing is written.

    Raises:
        UserError: the configuration can't work.
    """
    _check(config, warn)
    return render(resolved(config), _run_dir(config))


def test(config: Config, warn: Say) -> str:
    """Check everything, and let Slurm look at the job; nothing is written and nothing queued.

    Returns:
        Slurm's words.

    Raises:
        UserError: it can't work like this.
        SlurmError: Slurm does not answer.
    """
    _check(config, warn)
    return _check_here(config, warn)


def submit(config: Config, warn: Say) -> int:
    """Submit a new run, exactly once.

    Returns:
        id of the job. It may be an earlier one of the same configuration, whose submission got no answer.

    Raises:
        UserError: it can't work like this, or the run directory is another run's; nothing is queued.
        SlurmError: Slurm does not answer.
    """
    run_dir = _run_dir(config)
    if run_dir.config.exists() and not run_dir.attempts():
        _refuse_others(run_dir, config)
        _refuse_alive(run_dir)
        if (job := _unanswered(run_dir)) is not None:
            return job
    _check(config, warn)
    _check_here(config, warn)
    run_dir.root.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir.config, dump_config(resolved(config)).encode())
    return _submit(run_dir)


def resume(run_dir: RunDir, overrides: Sequence[str], warn: Say) -> int | None:
    """Submit a run again, or bring a job back that Slurm has forgotten to start.

    Args:
        overrides: settings that are different from now on.

    Returns:
        id of the job; None if the run is complete.

    Raises:
        as `submit`.
    """
    for state in _refuse_alive(run_dir):
        # After a node failure: some components are requeued, others have ended, and the whole waits for ever.
        with contextlib.suppress(commands.SlurmError):
            # Slurm says that the job is pending, fails, and requeues what was missing.
            commands.scontrol("requeue", str(state.leader.job))
        return state.leader.job
    if (job := _unanswered(run_dir)) is not None:
        return job
    config, changed = change_settings(run_dir, overrides, here=False)
    for change in changed:
        print(f"{change.field} was {change.was} and is {change.now}")
    complete = (read_json(run_dir.status) or {}).get("state") == "completed"
    if complete and STEPS not in [change.field for change in changed]:
        return None
    for warning in [*check_shape(config), *check_fit(config, read_cluster()), *check_places(config)]:
        warn(warning)
    run_dir.cancelled.unlink(missing_ok=True)
    return _submit(run_dir)


def was_submitted(run_dir: RunDir) -> bool:
    """Whether a run was last started by Slurm, or is to be."""
    from specbatch.launch.history import read_attempt

    attempts = run_dir.attempts()
    last = read_attempt(run_dir, attempts[-1]) if attempts else None
    return bool(last.job) if last else run_dir.submission.exists() or bool(read_jobs(run_dir, "run"))


def _run_dir(config: Config) -> RunDir:
    return RunDir(Path(config.run.dir).absolute())


def _check(config: Config, warn: Say) -> None:
    """What can be known without Slurm."""
    from specbatch.checks import check

    for warning in [*check(config, here=False), *check_shape(config)]:
        warn(warning)


def _check_here(config: Config, warn: Say) -> str:
    """What can be known on a host of the cluster; Slurm's words on the job."""
    from specbatch.corpus import try_first_rows

    config = resolved(config)
    warnings = check_fit(config, read_cluster()) + check_places(config)
    with tempfile.TemporaryDirectory(prefix="specbatch-") as folder:
        script = Path(folder) / SCRIPT
        script.write_text(render(config, _run_dir(config)))
        words = commands.check(script)
    for warning in warnings + try_first_rows(config):
        warn(warning)
    return words


def _submit(run_dir: RunDir) -> int:
    """Write what the job needs, and queue it."""
    from specbatch.launch.slurm.executor import ComponentsExecutor

    config = load_config(run_dir.config)
    token = commands.new_token()
    write_json(run_dir.submission, {"token": token, "time": time.time()})
    try:
        jobs = ComponentsExecutor(run_dir, config).submit_components(token)
    except UserError:
        run_dir.submission.unlink()
        raise
    run_dir.submission.unlink()
    register(run_dir)
    return int(next(iter(jobs.values())).job_id)


def _unanswered(run_dir: RunDir) -> int | None:
    """The job that an earlier submission made, which never came to know its id; None if there is none."""
    submission = read_json(run_dir.submission)
    if submission is None:
        return None
    job = commands.find(submission["token"])
    if job is not None:
        record_job(run_dir, job, size=size(load_config(run_dir.config)))
        register(run_dir)
    run_dir.submission.unlink()
    return job


def _refuse_others(run_dir: RunDir, config: Config) -> None:
    there, wanted = _lines(load_config(run_dir.config)), _lines(resolved(config))
    differing = [f"{key}: {there[key]}, not {wanted[key]}" for key in wanted if there.get(key) != wanted[key]]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"run.dir: {run_dir.root} is another configuration's ({differing[0]}{more}); give another run.dir, or "
            "remove this one"
        )


def _lines(config: Config) -> dict[str, object]:
    """Values by dotted key."""
    from specbatch.config.load import config_options

    found: dict[str, object] = {}
    for key in config_options():
        value: object = config
        for name in key.split("."):
            value = getattr(value, name)
        found[key] = value
    return found


def _refuse_alive(run_dir: RunDir) -> list[JobState]:
    """Refuse a run of which a job is queued or runs. Returns those jobs that are queued, but stuck for ever."""
    jobs = {job.id: job for job in read_jobs(run_dir, "run")}
    if not jobs:
        return []
    rows = parse_squeue(commands.squeue("--me", "--array", "--states=all", f"--format={SQUEUE_FORMAT}"))
    stuck = []
    for job in jobs.values():
        state = job_state([row for row in rows if row.job == job.id], job.size)
        if state is None or state.condition is Condition.OVER:
            continue
        if state.condition is not Condition.STUCK:
            raise UserError(
                f"{run_dir.root}: is {state.condition} as job {job.id} already; `specbatch status` tells how it "
                "stands, `specbatch cancel` ends it"
            )
        stuck.append(state)
    return stuck
