"""The doctor as a job of a few minutes: the run's own components, directives, containers and Pythons."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from specbatch.config import Config
from specbatch.doctor.task import ENGINES_ENDED
from specbatch.errors import RunError
from specbatch.inference.arguments import start_timeout_s
from specbatch.rundir import RunDir, write_whole
from specbatch.slurm import commands
from specbatch.slurm.check_request import limit_s
from specbatch.slurm.directives import directives
from specbatch.slurm.durations import slurm_time
from specbatch.slurm.parts import component_count, parts_of
from specbatch.slurm.preamble import preamble
from specbatch.slurm.query import query_jobs
from specbatch.slurm.states import Condition
from specbatch.slurm.steps import component_function
from specbatch.target import read_target

SCRIPT, LOG = "doctor.sbatch", "doctor.log"
CHECKS_S = 600.0
"""Requested time in addition to the time that engines may take to start, which SGLang rarely needs."""
LOOK_S, APPEARS_S = 5.0, 60.0
"""Seconds between two looks at the job, and until Slurm's queue has to show it."""


def examine_in_job(config: Config, root: Path, say: Callable[[str], None]) -> int:
    """Queue the doctor's job and wait for its end; the findings of its tasks are in the directory.

    Args:
        config: configuration of the trial, as in ``config.yaml`` there.

    Returns:
        the job's id.

    Raises:
        UserError: Slurm rejects it.
        RunError: Slurm does not answer.
    """
    path = root / SCRIPT
    write_whole(path, render_doctor(config, RunDir(root)).encode(), mode=0o755)
    job = commands.submit(path)
    say(f"job {job} checks all nodes; `scancel {job}` ends it")
    told, unknown_until = "", time.monotonic() + APPEARS_S
    while True:
        answer = query_jobs([job], [root.stat().st_uid], 30.0)
        if answer.problem:
            raise RunError(f"job {job}: {answer.problem}")
        state = answer.state(job, component_count(config))
        if state is None and time.monotonic() < unknown_until:
            time.sleep(LOOK_S)
            continue
        if state is None or state.condition is Condition.OVER:
            return job
        unknown_until = 0.0
        now = f"job {job} is {state.condition}" + (f": {state.why}" if state.why else "")
        if now != told:
            say(now)
            told = now
        time.sleep(LOOK_S)


def render_doctor(config: Config, run_dir: RunDir) -> str:
    """Return the text of ``doctor.sbatch``.

    Raises:
        UserError: the directory's name can't be part of a script.
    """
    longest = CHECKS_S + start_timeout_s(config, read_target(config.target.path))
    limit = slurm_time(60 * math.ceil(min(longest, limit_s(config)) / 60))
    short = replace(config, slurm=replace(config.slurm, time=limit, recovery="none"))
    short = replace(short, run=replace(short.run, name=f"{short.run.name}-doctor"))
    lines = [
        "#!/bin/bash",
        "# Checks whether a run of specbatch will work on the nodes that it requests. `specbatch doctor` submits it.",
        "",
        *directives(short),
        "",
        *preamble(run_dir, LOG),
        'export SPECBATCH_HEAD="$SLURMD_NODENAME"',
        "",
        *(line for part in parts_of(short) for line in component_function(part, run_dir)),
        "on_head specbatch.doctor.task head &",
        "on_training specbatch.doctor.task training &",
        "on_inference specbatch.doctor.task inference",
        f"touch {shlex.quote(ENGINES_ENDED)}",
        "wait",
        "",
    ]
    return "\n".join(lines)
