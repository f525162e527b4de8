"""Renders the batch script of engines that join a running run; `specbatch scale` submits it."""

from __future__ import annotations

import dataclasses

from specbatch.config import Config
from specbatch.config.engine_nodes import gpus_of_engine, nodes_per_engine
from specbatch.rundir import RunDir
from specbatch.slurm.directives import common_directives, job_name, resources, sbatch_lines
from specbatch.slurm.parts import JobPart
from specbatch.slurm.preamble import beginning, output_path
from specbatch.slurm.steps import python_of, step_lines


def render_engines(config: Config, run_dir: RunDir) -> str:
    """Return the text of a script for engines that join a running run: a job for each, or for those of a whole node, or
    an array of such jobs.

    A job that ends by itself while it is being preempted is complete for Slurm, and never returns. So an engine that
    was told to leave, but not cancelled, has its own job requeued: it joins again when there is room.

    Raises:
        UserError: the run directory's name can't be written into a script.
    """
    slurm, settings = config.slurm, config.slurm.inference
    nodes, tasks = nodes_per_engine(config), engines_a_job(config)
    gpus = settings.gpus_per_node if slurm.whole_nodes else gpus_of_engine(config)
    share = dataclasses.replace(settings, nodes=nodes, gpus_per_node=gpus)
    asked = resources(config, share if settings.gpus_per_node else settings, nodes) | {"ntasks-per-node": tasks}
    common = {name: value for name, value in common_directives(config).items() if name != "no-requeue"}
    common |= {"job-name": f"{job_name(config)}-engine", "output": output_path(run_dir, "engines.log")}
    block = common | {"requeue": True} | asked | slurm.extra | settings.extra
    about = [
        "Engines that join a running run of specbatch, and may vanish at any time. `specbatch scale` submits them;",
        "by hand, use `sbatch --array=0-3 --partition=preempt engines.sbatch`.",
    ]
    lines = [
        *beginning(about, sbatch_lines(block), run_dir, "engines.log"),
        "# The engine handles TERM and USR2 itself; this script waits for it.",
        "trap : TERM USR2",
        *step_lines(
            JobPart("engine", settings, nodes, tasks * nodes, ""),
            f"{python_of(settings)} -u -m specbatch engine .",
            run_dir,
        ),
        AGAIN,
    ]
    return "\n".join(lines)


def engines_a_job(config: Config) -> int:
    """Return the number of added engines that share one job: those of a whole node, or one."""
    gpus = config.slurm.inference.gpus_per_node
    return max(1, gpus // config.inference.tensor_parallel) if config.slurm.whole_nodes else 1


AGAIN = """\
code=$?
# 75: it was told to leave, and the run continues. Slurm shows a job under preemption as running, a cancelled one not.
# An element of an array may have the array's own id.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
if [ "$code" = 75 ] && [ "$(squeue --noheader --all --jobs="$job" --format=%T)" = RUNNING ]; then
    scontrol requeue "$job"
fi
exit $code
"""
