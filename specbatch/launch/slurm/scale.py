"""More engines for a running run, and fewer again: each is a plain job of its own, an element of an array.

A heterogeneous job can't grow, and is preempted as a whole or not at all; what is added shares neither fate.
"""

from __future__ import annotations

from collections.abc import Sequence

from specbatch.config import load_config
from specbatch.errors import RunError, UserError
from specbatch.launch.slurm.ask import Answer, ask
from specbatch.launch.slurm.commands import scancel, submit
from specbatch.launch.slurm.jobs import read_jobs, record_job
from specbatch.launch.slurm.script import render_engines
from specbatch.launch.slurm.states import WAITING, Row
from specbatch.rundir import RunDir, read_json, write_whole

ASK_S = 20.0
SCRIPT = "engines.sbatch"


def add(run_dir: RunDir, count: int, options: Sequence[str]) -> str:
    """Submit engines that join the run.

    Args:
        options: further ones of sbatch; they win over what the run's own engines ask for.

    Returns:
        what was done, in words.

    Raises:
        UserError: the run has ended, is no job, or Slurm does not take the engines.
        RunError: Slurm could not be asked.
    """
    status = read_json(run_dir.status) or {}
    if status.get("state") == "completed":
        raise UserError(f"{run_dir.root}: the run is complete: it needs no engines")
    if run_dir.cancelled.exists():
        raise UserError(f"{run_dir.root}: the run is cancelled: go on with it first, with `specbatch resume`")
    answer = _ask(run_dir)
    if not any(answer.alive(job.id) for job in read_jobs(run_dir, "run")):
        raise UserError(f"{run_dir.root}: the run has no job in Slurm that engines could join: submit it first")
    script = run_dir.root / SCRIPT
    write_whole(script, render_engines(load_config(run_dir.config), run_dir).encode(), mode=0o755)
    job = submit(script, [f"--array=0-{count - 1}", *options])
    record_job(run_dir, job, kind="engines", size=count)
    return f"job {job}: {count} more engines, which join as their nodes become free"


def remove(run_dir: RunDir, count: int) -> str:
    """Take engines away again that were added: those first that wait for their nodes, then the newest.

    Returns and raises: as `add`.
    """
    answer = _ask(run_dir)
    alive = [(row, job.size) for job in read_jobs(run_dir, "engines") for row in answer.alive(job.id)]
    if not alive:
        raise UserError(f"{run_dir.root}: no engines were added that could be taken away")
    alive.sort(key=lambda pair: _worth(pair[0]))
    gone = [str(row.job) if size == 1 else f"{row.job}_{row.index}" for row, size in alive[:count]]
    scancel(*gone)
    fewer = f"; there were no more than {len(alive)}" if len(alive) < count else ""
    return f"{len(gone)} added engines leave: {', '.join(gone)}{fewer}"


def _worth(row: Row) -> tuple[bool, float]:
    """Those that have done the most come last."""
    return row.state not in WAITING, row.used_s


def _ask(run_dir: RunDir) -> Answer:
    jobs = read_jobs(run_dir)
    if not jobs:
        raise UserError(f"{run_dir.root}: the run is no Slurm job: engines from other nodes could not reach it")
    answer = ask((job.id for job in jobs), {run_dir.root.stat().st_uid}, ASK_S)
    if answer.problem:
        raise RunError(f"{run_dir.root}: {answer.problem}")
    return answer
