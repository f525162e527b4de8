"""The beginning of every batch script: it changes to the run directory, writes to its log, and unsets variables of the
shell that submits it."""

from __future__ import annotations

import re
import shlex
import textwrap

from specbatch.errors import UserError
from specbatch.rundir import RunDir

LEFT_FROM_ELSEWHERE = (
    "SLURM_CPU_BIND SLURM_CPU_BIND_TYPE SLURM_CPU_BIND_LIST SLURM_CPU_BIND_VERBOSE SLURM_CPUS_PER_TASK "
    "SLURM_DISTRIBUTION SLURM_EXACT SLURM_EXCLUSIVE SLURM_GPUS_PER_TASK SLURM_HINT SLURM_KILL_BAD_EXIT "
    "SLURM_NPROCS SLURM_NTASKS SLURM_NTASKS_PER_NODE SLURM_OPEN_MODE SLURM_OVERLAP SLURM_THREADS_PER_CORE "
    "SLURM_TRES_PER_TASK SLURM_UNBUFFEREDIO SLURM_WAIT "
    "http_proxy https_proxy all_proxy ftp_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY FTP_PROXY"
)
"""Variables that the submitting shell may have set for itself: options that srun would apply to our steps, and proxies,
through which components would not reach each other."""


def beginning(about: list[str], directives: list[str], run_dir: RunDir, log: str) -> list[str]:
    """Return the lines of a script down to its own work.

    Args:
        about: what the script is for, as lines of a comment.

    Raises:
        UserError: the run directory's name can't be written into a script.
    """
    return [
        "#!/bin/bash",
        *(f"# {line}" for line in about),
        "",
        *([*directives, ""] if directives else []),
        *preamble(run_dir, log),
    ]


def preamble(run_dir: RunDir, log: str) -> list[str]:
    """Return the first lines of each script: it changes to the run directory, writes to its log there, and unsets
    variables of the submitting shell."""
    return [
        f"run={shlex.quote(root_of(run_dir))}",
        _LOG.format(log=log),
        _CLEAN.format(leftovers=_wrapped(LEFT_FROM_ELSEWHERE)),
    ]


def output_path(run_dir: RunDir, name: str) -> str:
    """Return the file for the job's output, which ``scontrol show job`` shows; the script itself appends to it, too.

    In file names Slurm replaces ``%j`` and the like, and a backslash changes how. No name with these is used.
    """
    path = root_of(run_dir) + f"/{name}"
    return path if re.fullmatch(r"[\w./+,:=@ -]+", path) else "/dev/null"


def root_of(run_dir: RunDir) -> str:
    """Return the run directory's path for a script.

    Raises:
        UserError: it has a line break.
    """
    root = str(run_dir.root)
    if re.search(r"[\n\r\0]", root):
        raise UserError("run.dir: has a line break in its name, which is impossible in a batch script; rename it")
    return root


def _wrapped(words: str) -> str:
    return " \\\n    ".join(textwrap.wrap(words, 110))


_LOG = """\
cd "$run" || exit 1
ulimit -S -c 0
exec >>{log} 2>&1 </dev/null
"""

_CLEAN = """\
# Unset variables of the submitting shell.
unset {leftovers}
"""
