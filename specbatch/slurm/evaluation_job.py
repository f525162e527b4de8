"""A job that measures a draft on one node, as an engine of the run would have it: `specbatch evaluate --submit`.

The job runs `specbatch evaluate` without ``--submit``. ``evaluation.json`` is written whole at the end: a job that is
preempted or loses its node leaves none, is requeued, and measures anew.
"""

from __future__ import annotations

import json
import math
import shlex
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from specbatch.config import Config, Evaluate, dump_config
from specbatch.config.engine_nodes import gpus_of_engine, nodes_per_engine
from specbatch.config.options import options_of
from specbatch.errors import RunError, UserError
from specbatch.evaluation.engines import Subject
from specbatch.evaluation.subjects import check_runs_on_cpu
from specbatch.inference.arguments import start_timeout_s
from specbatch.rundir import EVALUATION_LOG, RunDir, write_whole
from specbatch.slurm import commands
from specbatch.slurm.check_cluster import check_cluster
from specbatch.slurm.check_request import check_request, check_stage, limit_s
from specbatch.slurm.cluster import read_cluster
from specbatch.slurm.directives import directive, job_name, requests
from specbatch.slurm.durations import slurm_time
from specbatch.slurm.jobs import read_jobs, record_job
from specbatch.slurm.parts import JobPart, main_part
from specbatch.slurm.preamble import output_path, preamble
from specbatch.slurm.query import query_jobs
from specbatch.slurm.shared_paths import check_shared_paths
from specbatch.slurm.steps import python_of, step_lines
from specbatch.slurm.submit import resolved

SCRIPT = "evaluate.sbatch"
"""In the run directory, or in the directory of a measurement without a run."""
DECODING_S = 3600.0
"""Time that is asked for besides the time that engines may take to start."""
ASK_S = 20.0

Say = Callable[[str], None]


def job_config(subject: Subject, root: Path, *, own_limit: bool = False) -> Config:
    """Return the configuration of the job: one node with an engine's resources, and a time limit of its own.

    Args:
        subject: with the run's configuration.
        root: directory of the script and the log.
        own_limit: the limit is ``slurm.time``; else it is what engines may take to start and an hour, if that is less.

    Raises:
        UserError: the target needs more than one node.
    """
    config = subject.config
    slurm, inference = config.slurm, config.slurm.inference
    if slurm.layout == "single" and main_part(config) == "training":
        # All nodes of such a job are alike, so the inference component need not repeat what training asks for.
        for key in ("partition", "gpus_per_node", "mem", "constraint", "extra"):
            inference = replace(inference, **{key: getattr(inference, key) or getattr(slurm.training, key)})
        config = replace(config, slurm=replace(slurm, inference=inference))
    if (nodes := nodes_per_engine(config)) > 1:
        raise UserError(
            f"inference.tensor_parallel: {config.inference.tensor_parallel} needs {nodes} nodes, and --submit measures "
            "on one: a run whose engines are larger than a node measures its draft itself, at its end"
        )
    if inference.gpus_per_node and not slurm.whole_nodes:
        inference = replace(inference, gpus_per_node=gpus_of_engine(config))
    inference = replace(inference, nodes=1)
    time_s = limit_s(config)
    if not own_limit:
        starts = 1 + len({subject.settings.draft_tokens, *(subject.draft_tokens if subject.sweeps else ())})
        time_s = min(time_s, starts * start_timeout_s(config, subject.shape) + DECODING_S)
    return replace(
        config,
        # A job without training has only nodes of the inference component, on the first of which its head would be.
        run=replace(config.run, dir=str(root), goal="answers"),
        data=replace(config.data, train=[]),
        draft=replace(config.draft, init_from=None),
        inference=replace(config.inference, engines=1),
        slurm=replace(
            slurm, layout="single", head_on="training", recovery="requeue", signal_s=1,
            time=slurm_time(60 * math.ceil(time_s / 60)), head=inference, inference=inference, training=inference,
        ),
    )  # fmt: skip


def submit_evaluation(
    subject: Subject,
    run_dir: RunDir,
    words: list[str],
    warn: Say,
    say: Say,
    *,
    own_limit: bool = False,
    keep: Config | None = None,
) -> tuple[int, Config]:
    """Check everything that can be known beforehand, then queue the job.

    Args:
        subject: checked with its prompts.
        run_dir: of the run, or of a measurement without one.
        words: those of `specbatch evaluate` in the job.
        own_limit: as for `job_config`.
        keep: a configuration that is written to ``config.yaml``, for a measurement without a run.

    Returns:
        the job's id, and its configuration.

    Raises:
        UserError: it can't work; nothing is queued.
        RunError: Slurm does not answer.
    """
    if keep is not None and run_dir.config.exists() and (run_dir.attempts() or not (run_dir.root / SCRIPT).exists()):
        raise UserError(f"--out: {run_dir.root} is the directory of a run, or of something else; name another one")
    job = job_config(subject, run_dir.root, own_limit=own_limit)
    if not job.slurm.inference.gpus_per_node:
        check_runs_on_cpu(subject, "ask for GPUs: slurm.inference.gpus_per_node")
    check_request(job)
    check_stage(job, subject.shape.weights.total_bytes)
    say("asking Slurm what the cluster has")
    _refuse_second(run_dir)
    cluster = read_cluster()
    job = resolved(job, cluster, say)
    for warning in [*check_cluster(job, cluster), *check_shared_paths(job, {"--draft": subject.draft.absolute()})]:
        warn(warning)
    text = render_evaluation(job, words)
    with tempfile.TemporaryDirectory(prefix="specbatch-") as folder:
        script = Path(folder) / SCRIPT
        script.write_text(text)
        commands.check(script)
    run_dir.make()
    if keep is not None:
        write_whole(run_dir.config, dump_config(keep).encode())
    path = run_dir.root / SCRIPT
    write_whole(path, text.encode(), mode=0o755)
    number = commands.submit(path)
    record_job(run_dir, number, kind="evaluation")
    return number, job


def _refuse_second(run_dir: RunDir) -> None:
    """Refuse a measurement while another one of the same directory is queued or runs.

    Raises:
        UserError: one is.
        RunError: Slurm could not be asked.
    """
    jobs = [job.id for job in read_jobs(run_dir, "evaluation")]
    answer = query_jobs(jobs, [run_dir.root.stat().st_uid], ASK_S) if jobs else None
    if answer is None:
        return
    if answer.problem:
        raise RunError(f"{run_dir.root}: {answer.problem}")
    if alive := [job for job in jobs if answer.alive(job)]:
        raise UserError(
            f"{run_dir.root}: job {alive[-1]} measures a draft there already; wait for it, or end it with `scancel "
            f"{alive[-1]}`"
        )


def render_evaluation(job: Config, words: list[str]) -> str:
    """Return the text of ``evaluate.sbatch``.

    Args:
        job: as `job_config` gives it.
        words: as for `submit_evaluation`.

    Raises:
        UserError: the directory's name can't be written into a script.
    """
    run_dir, settings = RunDir(Path(job.run.dir)), job.slurm.inference
    (asked,) = requests(job).values()
    asked = {name: value for name, value in asked.items() if name != "signal"}
    asked |= {"job-name": f"{job_name(job)}-evaluate", "output": output_path(run_dir, EVALUATION_LOG)}
    command = f"{python_of(settings)} -u -m specbatch evaluate {shlex.join(words)}"
    lines = [
        "#!/bin/bash",
        "# Measures a draft. `specbatch evaluate --submit` submits it, and `sbatch evaluate.sbatch` does the same.",
        "",
        *(f"#SBATCH {directive(name, value)}" for name, value in asked.items() if value is not None),
        "",
        *preamble(run_dir, EVALUATION_LOG),
        _BEGINS,
        *step_lines(JobPart("evaluate", settings, 1, 1, ""), command, run_dir),
        _ENDS,
    ]
    return "\n".join(lines)


def words_of(settings: Evaluate, own: Evaluate) -> Iterator[str]:
    """Options of `specbatch evaluate` that make the second section the first."""
    for name in options_of(Evaluate):
        value, before = _field(settings, name), _field(own, name)
        if value != before:
            yield f"--{name}={value if isinstance(value, str) else json.dumps(value)}"


def _field(settings: Evaluate, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


_BEGINS = """\
echo "$(date '+%Y-%m-%d %H:%M:%S') specbatch: job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURMD_NODENAME"
trap : TERM
"""
_ENDS = """\
code=$?
# 143: SIGTERM. A job that ends by itself while it is being preempted would never come back. For Slurm, what is being
# preempted runs, and what was cancelled or has reached its time limit does not.
if [ "$code" = 143 ] && [ "$(squeue --noheader --all --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""
