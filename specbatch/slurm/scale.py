"""Adds engines to a running run, and removes them: each is a separate plain job, an element of an array.

A heterogeneous job can't grow, and is preempted as a whole or not at all; separate jobs avoid both.
"""

from __future__ import annotations

from collections.abc import Sequence

from specbatch.config import load_config
from specbatch.config.engine_nodes import nodes_per_engine
from specbatch.errors import RunError, UserError
from specbatch.rundir import RunDir, write_whole
from specbatch.slurm.check_request import refuse_forbidden
from specbatch.slurm.commands import scancel, submit
from specbatch.slurm.engine_script import engines_a_job, render_engines
from specbatch.slurm.jobs import read_jobs, record_job
from specbatch.slurm.query import SlurmJobs, query_jobs
from specbatch.slurm.states import WAITING, JobRow
from specbatch.status_file import is_complete

ASK_S = 20.0
SCRIPT = "engines.sbatch"


def add(run_dir: RunDir, count: int, options: Sequence[str]) -> str:
    """Submit engines that join the run.

    Args:
        options: further options of sbatch, which override what the run's own engines request.

    Returns:
        a description of what was done.

    Raises:
        UserError: the run has ended or is not a job, or Slurm rejects the engines.
        RunError: Slurm could not be reached.
    """
    if is_complete(run_dir):
        raise UserError(f"{run_dir.root}: the run is complete, so it needs no engines")
    if run_dir.cancelled.exists():
        raise UserError(f"{run_dir.root}: the run is cancelled; first continue it with `specbatch resume`")
    answer = _ask(run_dir)
    if not any(answer.alive(job.id) for job in read_jobs(run_dir, "run")):
        raise UserError(f"{run_dir.root}: the run has no job in Slurm that engines could join; submit it first")
    script = run_dir.root / SCRIPT
    config = load_config(run_dir.config)
    for option in options:
        name, _, value = option.lstrip("-").partition("=")
        refuse_forbidden(config, name, value or True)
    write_whole(script, render_engines(config, run_dir).encode(), mode=0o755)
    each, nodes = engines_a_job(config), nodes_per_engine(config)
    jobs = -(-count // each)
    how = f", {each} a node" if each > 1 else f", each over {nodes} nodes" if nodes > 1 else ""
    said = f"{jobs * each} more engines{how}, which join as their nodes become free"
    if config.slurm.forbidden.get("array"):
        ids = []
        for _ in range(jobs):
            ids.append(submit(script, options))
            record_job(run_dir, ids[-1], kind="engines")
        return f"jobs {', '.join(map(str, ids))}: {said}"
    job = submit(script, [f"--array=0-{jobs - 1}", *options])
    record_job(run_dir, job, kind="engines", size=jobs)
    return f"job {job}: {said}"


def remove(run_dir: RunDir, count: int) -> str:
    """Remove added engines: first those that wait for nodes, then the newest.

    Returns and raises the same as `add`.
    """
    answer = _ask(run_dir)
    alive = [(row, job.size) for job in read_jobs(run_dir, "engines") for row in answer.alive(job.id)]
    if not alive:
        raise UserError(f"{run_dir.root}: has no added engines that could be removed")
    alive.sort(key=lambda pair: _worth(pair[0]))
    gone = [str(row.job) if size == 1 else f"{row.job}_{row.index}" for row, size in alive[:count]]
    scancel(*gone)
    fewer = f"; there were only {len(alive)}" if len(alive) < count else ""
    return f"{len(gone)} added engines leave: {', '.join(gone)}{fewer}"


def _worth(row: JobRow) -> tuple[bool, float]:
    """Return a sort key by which engines that have done the most come last."""
    return row.state not in WAITING, row.used_s


def _ask(run_dir: RunDir) -> SlurmJobs:
    jobs = read_jobs(run_dir)
    if not jobs:
        raise UserError(f"{run_dir.root}: the run is not a Slurm job, so engines on other nodes could not reach it")
    answer = query_jobs((job.id for job in jobs), {run_dir.root.stat().st_uid}, ASK_S)
    if answer.problem:
        raise RunError(f"{run_dir.root}: {answer.problem}")
    return answer
