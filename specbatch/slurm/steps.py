"""How a component's programs are started on its nodes: as a step of srun, which first says what a node lacks."""

from __future__ import annotations

import shlex
import sys

from specbatch.config import Config
from specbatch.config.sections import SlurmComponent
from specbatch.rundir import RunDir
from specbatch.slurm.parts import JobPart
from specbatch.slurm.preamble import root_of

CANNOT_START = 126
"""Exit code of a component that could not be started; another is 127, bash's own for a missing program."""
_OF_CONTAINERS = ("--container-image", "--environment=")
"""Options that plug-ins of srun have for containers: pyxis, and CSCS's Container Engine."""


def python_of(settings: SlurmComponent) -> str:
    """Return the Python command of a component, for bash."""
    return shlex.quote(settings.python or sys.executable)


def other_root(settings: SlurmComponent) -> bool:
    """Whether a component may run where the files of its node are not to be seen: in a container."""
    return bool(settings.launch) or any(option.startswith(_OF_CONTAINERS) for option in settings.srun)


def outer_python(config: Config) -> str:
    """The Python of a job's script itself, for bash: the head's, or the one that submits where the head is in a
    container, in which Slurm's commands need not be."""
    return shlex.quote(sys.executable) if other_root(config.slurm.head) else python_of(config.slurm.head)


def component_function(part: JobPart, run_dir: RunDir) -> list[str]:
    """Return a bash function, named ``on_`` and the component, that runs a Python module in all its tasks."""
    lines = step_lines(part, f'{python_of(part.settings)} -u -m "$@"', run_dir)
    return [f"on_{part.name}() {{", *(f"    {line}" for line in lines), "}", ""]


def step_lines(part: JobPart, command: str, run_dir: RunDir) -> list[str]:
    """Return the lines that run a component's command on its nodes."""
    settings = part.settings
    options = [part.where] if part.where else []
    options += [f"--nodes={part.nodes}", f"--ntasks={part.tasks}"]
    if settings.cpus_per_task:
        options.append(f"--cpus-per-task={settings.cpus_per_task}")
    if not any(option.startswith(("--cpu-bind", "--cpu_bind")) for option in settings.srun):
        # Otherwise Slurm's plug-ins may bind a task to one core. The job's CPUs still limit it.
        options.append("--cpu-bind=none")
    options += [shlex.quote(option) for option in settings.srun]
    return [
        f"srun {' '.join(options)} --unbuffered --kill-on-bad-exit=0 \\",
        f"    bash -c {shlex.quote(_inside(settings, run_dir))} {part.name} \\",
        f"    {command}",
    ]


def _inside(settings: SlurmComponent, run_dir: RunDir) -> str:
    """Return what bash does on a node before a component's program starts. If that is not possible, it ends with
    `CANNOT_START`, and a line that begins with the component's name, like bash's own messages, says why."""
    lines = [
        "ulimit -S -c 0",
        f'[ -e config.yaml ] || {{ echo "$0: $(hostname) does not see the run directory" '
        f"{shlex.quote(root_of(run_dir))} >&2; exit {CANNOT_START}; }}",
    ]
    if settings.setup:
        lines.append(_CHECKED)
    for line in settings.setup:
        lines += [line, f"checked $? {shlex.quote(line)}"]
    return "\n".join([*lines, f'exec {settings.launch} "$@"'.replace("exec  ", "exec ")])


_CHECKED = f"""\
checked() {{ [ "$1" = 0 ] || {{ echo "$0: setup: on $(hostname), exit code $1: $2" >&2; exit {CANNOT_START}; }}; }}"""
