"""Submits a run: all checks come before anything is written, and all files are written before the job is queued.

Nothing expensive is done here unless requested: only the first rows of the data are checked, and the first attempt
prepares the data. If the outcome of a submission is unknown, its job is searched before another submission; and while
one is under way, in any process on any host, no other starts.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from specbatch.config import Config, dump_config, load_config
from specbatch.config.change import STEPS
from specbatch.errors import UserError
from specbatch.known_runs import register
from specbatch.run.change import change_settings
from specbatch.rundir import RunDir, write_whole
from specbatch.slurm import commands
from specbatch.slurm.check_cluster import check_cluster
from specbatch.slurm.check_request import check_node_memory, check_request, check_stage
from specbatch.slurm.cluster import Cluster, read_cluster
from specbatch.slurm.cpu_share import SHARED, with_cpus
from specbatch.slurm.directives import requests
from specbatch.slurm.durations import slurm_time
from specbatch.slurm.first_rows import check_first_rows
from specbatch.slurm.jobs import read_jobs
from specbatch.slurm.parts import parts_of
from specbatch.slurm.prepare_job import cpus_for, submit_preparation
from specbatch.slurm.script import SCRIPT, render
from specbatch.slurm.shared_paths import check_image_folders, check_shared_paths
from specbatch.slurm.states import SQUEUE_FORMAT, Condition, JobState, job_state, parse_squeue
from specbatch.slurm.submission import alone, unanswered
from specbatch.status_file import is_complete

Say = Callable[[str], None]
Prepare = Literal["", "here", "job"]
WORTH_PREPARING_S = 60.0
"""Seconds from which on preparing the data beforehand is advised."""


def resolved(config: Config, cluster: Cluster | None = None, say: Say = lambda _: None) -> Config:
    """Return the configuration for the run directory: complete without the profile, which may change; with the account
    that the shell names (``SBATCH_ACCOUNT``), as sites advise; and with the CPUs of each task.

    Args:
        cluster: used for CPUs if neither configuration nor profile says them.
        say: called with choices that were made.
    """
    account = config.slurm.account or os.environ.get("SBATCH_ACCOUNT", "")
    found, chosen = with_cpus(replace(config, slurm=replace(config.slurm, profile="", account=account)), cluster)
    for text in chosen:
        say(text)
    return found


def script_of(config: Config, warn: Say) -> str:
    """Return the script, checked as far as possible without Slurm; nothing is written.

    Raises:
        UserError: the configuration can't work.
    """
    _check(config, warn)
    return render(resolved(config), _run_dir(config))


def test(config: Config, warn: Say, say: Say) -> str:
    """Check everything, and have Slurm check the job; nothing is written or queued.

    Args:
        say: is called with what is being done.

    Returns:
        Slurm's message.

    Raises:
        UserError: it can't work like this.
        SlurmError: Slurm does not answer.
    """
    say("checking the configuration and the target")
    _check(config, warn)
    checked = _check_here(config, warn, say)
    _tell_of_preparing(checked, warn, say)
    return checked.words


def check_for_job(config: Config, warn: Say, say: Say) -> Config:
    """Check everything except the data. Return the run's configuration; raises the same as `test`."""
    say("checking the configuration and the target")
    _check(config, warn)
    return _check_with_slurm(config, warn, say)[0]


def submit(config: Config, warn: Say, say: Say, prepare: Prepare = "") -> int:
    """Submit a new run, exactly once.

    Args:
        say: is called with what is being done.
        prepare: who prepares the data if it is not prepared: this process, a separate job that the run waits for or, if
            empty, the first attempt.

    Returns:
        id of the job; possibly of an earlier one of the same configuration, whose submission got no answer.

    Raises:
        UserError: the run can't work, or the run directory is another run's; nothing is queued.
        SlurmError: Slurm does not answer.
    """
    run_dir, before = _run_dir(config), time.time()
    if run_dir.config.exists() and not run_dir.attempts():
        _refuse_others(run_dir, config)
        _refuse_alive(run_dir)
        if (job := unanswered(run_dir)) is not None:
            return job
    say("checking the configuration and the target")
    _check(config, warn)
    checked = _check_here(config, warn, say)
    if checked.left_s is not None and prepare == "here":
        _prepare_here(checked, say)
    elif prepare != "job":
        _tell_of_preparing(checked, warn, say)
    run_dir.make()
    with alone(run_dir, before) as token:
        write_whole(run_dir.config, dump_config(checked.config).encode())
        after = 0
        if checked.left_s is not None and prepare == "job":
            after = submit_preparation(checked.config, run_dir, checked.cluster, checked.left_s[0])
            say(f"job {after} prepares the data, and the run waits for it")
        say("queueing the job")
        return _submit(run_dir, token, after)


def resume(run_dir: RunDir, overrides: Sequence[str], warn: Say) -> int | None:
    """Submit a run again, or requeue a job that Slurm never starts.

    Args:
        overrides: settings that change from now on.

    Returns:
        id of the job; None if the run is complete.

    Raises:
        as `submit`.
    """
    before = time.time()
    for state in _refuse_alive(run_dir):
        # After a node failure some components are requeued and others have ended, so the whole waits forever.
        with contextlib.suppress(commands.SlurmError):
            # Slurm reports an error, since the job is pending, but requeues the missing components.
            commands.scontrol("requeue", str(state.leader.job))
        return state.leader.job
    if (job := unanswered(run_dir)) is not None:
        return job
    config, changed = change_settings(run_dir, overrides, here=False)
    for change in changed:
        print(f"{change.field} was {change.was} and is {change.now}")
    if is_complete(run_dir) and STEPS not in [change.field for change in changed]:
        return None
    for warning in [*check_request(config), *check_cluster(config, read_cluster()), *check_shared_paths(config)]:
        warn(warning)
    with alone(run_dir, before) as token:
        run_dir.cancelled.unlink(missing_ok=True)
        return _submit(run_dir, token)


def was_submitted(run_dir: RunDir) -> bool:
    """Return whether a run was last started by Slurm, or is queued."""
    from specbatch.run.attempts import read_attempt

    attempts = run_dir.attempts()
    last = read_attempt(run_dir, attempts[-1]) if attempts else None
    return bool(last.job) if last else run_dir.submission.exists() or bool(read_jobs(run_dir, "run"))


def _run_dir(config: Config) -> RunDir:
    return RunDir(Path(config.run.dir).absolute())


def _check(config: Config, warn: Say) -> None:
    """Check what is known without Slurm."""
    from specbatch.checks import check
    from specbatch.drafts.base import algorithm_of
    from specbatch.inference.resolution import check_engine
    from specbatch.target import read_target

    warnings, target = [*check(config, here=False), *check_request(config)], read_target(config.target.path)
    check_stage(config, target.weights.total_bytes if config.slurm.stage_target else 0)
    if config.run.goal == "answers":
        for warning in warnings:
            warn(warning)
        return
    for warning in [*warnings, *check_engine(config, target)]:
        warn(warning)
    check_node_memory(config, algorithm_of(config, target).contract.bytes_per_token)


@dataclass(frozen=True)
class _Checked:
    """The results of the checks on a host of the cluster."""

    config: Config
    """The run's configuration."""
    cluster: Cluster
    words: str
    """Slurm's message about the job."""
    left_s: tuple[float, float] | None
    """The same as in `FirstLook`."""


def _check_with_slurm(config: Config, warn: Say, say: Say) -> tuple[Config, Cluster, str]:
    """Check with Slurm; return the run's configuration, what the cluster has, and Slurm's message about the job."""
    say("asking Slurm what the cluster has")
    cluster = read_cluster()
    config = resolved(config, cluster, say)
    warnings = check_cluster(config, cluster) + check_shared_paths(config)
    with tempfile.TemporaryDirectory(prefix="specbatch-") as folder:
        script = Path(folder) / SCRIPT
        script.write_text(render(config, _run_dir(config)))
        words = commands.check(script)
    for warning in warnings:
        warn(warning)
    return config, cluster, words


def _check_here(config: Config, warn: Say, say: Say) -> _Checked:
    config, cluster, words = _check_with_slurm(config, warn, say)
    if config.run.goal == "answers" or config.data.regenerate.answers > 0:
        # The prompts' own answers are not used; the target's answers will be prepared.
        return _Checked(config, cluster, words, None)
    say("reading the first rows of the data")
    first = check_first_rows(config)
    for warning in [*first.warnings, *check_image_folders(config, first.image_folders)]:
        warn(warning)
    return _Checked(config, cluster, words, first.left_s)


def _tell_of_preparing(checked: _Checked, warn: Say, say: Say) -> None:
    """Report that the first attempt prepares the data, and what that costs if it takes long."""
    if checked.left_s is None:
        return
    (alone, here), config = checked.left_s, checked.config
    least = alone / max(1, min(config.slurm.head.cpus_per_task or 1, round(alone / max(here, 1e-9))))
    if least < WORTH_PREPARING_S:
        say(f"the data is not prepared: the first attempt does it, in about {max(1, round(least))} s")
        return
    nodes = sum(part.nodes for part in parts_of(config))
    own = alone / cpus_for(config, checked.cluster, alone)
    warn(
        f"the data is not prepared: the first attempt would take about {slurm_time(least)} for it, while {nodes} "
        f"nodes wait; `--prepare here` does it before the run is queued, in about {slurm_time(here)} on this host, and "
        f"`--prepare job` in a small job that the run waits for, in about {slurm_time(own)}"
    )


def _prepare_here(checked: _Checked, say: Say) -> None:
    from specbatch import corpus
    from specbatch.corpus.show import progress_bar

    assert checked.left_s is not None
    say(f"preparing the data: about {slurm_time(checked.left_s[1])}")
    with progress_bar() as progress:
        say(corpus.prepare(checked.config, progress).text())


def _submit(run_dir: RunDir, token: str, after: int = 0) -> int:
    """Write what the job needs, and queue it.

    Args:
        after: job for whose success it waits.
    """
    from specbatch.slurm.executor import ComponentsExecutor

    config = load_config(run_dir.config)
    options: tuple[str, ...] = ()
    if after:
        own = next(iter(requests(config).values())).get("dependency")
        waits = ",".join(filter(None, [f"afterok:{after}", own]))
        options = (f"--dependency={waits}", "--kill-on-invalid-dep=yes")
    jobs = ComponentsExecutor(run_dir, config).submit_components(token, options, after)
    register(run_dir)
    return int(next(iter(jobs.values())).job_id)


def _refuse_others(run_dir: RunDir, config: Config) -> None:
    there, wanted = _lines(load_config(run_dir.config)), _lines(resolved(config))
    chosen = {f"slurm.{name}.cpus_per_task" for name in SHARED}
    differing = [
        f"{key}: {there[key]}, not {wanted[key]}"
        for key in wanted
        if there.get(key) != wanted[key] and not (key in chosen and wanted[key] is None)
    ]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"run.dir: {run_dir.root} has another configuration ({differing[0]}{more}); give another run.dir, or "
            "remove this one"
        )


def _lines(config: Config) -> dict[str, object]:
    """Return values by dotted key."""
    from specbatch.config.load import config_options

    found: dict[str, object] = {}
    for key in config_options():
        value: object = config
        for name in key.split("."):
            value = getattr(value, name)
        found[key] = value
    return found


def _refuse_alive(run_dir: RunDir) -> list[JobState]:
    """Refuse a run with a queued or running job. Return its jobs that are queued, but stuck forever."""
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
                f"{run_dir.root}: is already {state.condition} as job {job.id}; `specbatch status` shows its "
                "state, `specbatch cancel` ends it"
            )
        stuck.append(state)
    return stuck
