"""The batch script of a run: what each component asks Slurm for, and how its programs are started.

Made for people too: they may read it, edit it, and submit it by hand. Facts about Slurm that it rests on: directives of
a heterogeneous job are inherited from component to component, except some, so each component repeats all of its own;
TERM and USR2 reach the programs themselves; when the script ends, Slurm ends what is left of the job.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

from specbatch.config import Config
from specbatch.config.sections import SlurmComponent
from specbatch.errors import UserError
from specbatch.rundir import RunDir

SCRIPT = "job.sbatch"
"""In the run directory."""
LEFT_FROM_ELSEWHERE = (
    "SLURM_CPU_BIND SLURM_CPU_BIND_TYPE SLURM_CPU_BIND_LIST SLURM_CPU_BIND_VERBOSE SLURM_CPUS_PER_TASK "
    "SLURM_DISTRIBUTION SLURM_EXACT SLURM_EXCLUSIVE SLURM_GPUS_PER_TASK SLURM_HINT SLURM_KILL_BAD_EXIT "
    "SLURM_NPROCS SLURM_NTASKS SLURM_NTASKS_PER_NODE SLURM_OPEN_MODE SLURM_OVERLAP SLURM_THREADS_PER_CORE "
    "SLURM_TRES_PER_TASK SLURM_UNBUFFEREDIO SLURM_WAIT "
    "http_proxy https_proxy all_proxy ftp_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY FTP_PROXY"
)
"""What the shell that submitted may have had for itself: options that srun would take for ours, and proxies, through
which components would not find each other."""


@dataclass(frozen=True)
class Part:
    """A component's place in the job."""

    name: str
    settings: SlurmComponent
    nodes: int
    tasks: int
    where: str
    """Options of srun that choose its nodes."""


def render(config: Config, run_dir: RunDir) -> str:
    """The text of ``job.sbatch``.

    Raises:
        UserError: the run directory's name can't be written into a script.
    """
    parts = parts_of(config)
    lines = [
        "#!/bin/bash",
        f"# A run of specbatch: {' '.join(config.run.name.split())}. Submit it with `specbatch submit`,",
        "# or by hand with `sbatch job.sbatch`, which is the same.",
        "",
        *_directives(config),
        "",
        f"run={shlex.quote(_root(run_dir))}",
        _LOG.format(log="job.log"),
        _CLEAN.format(leftovers=_wrapped(LEFT_FROM_ELSEWHERE)),
        _PRELUDE.format(python=_python(config.slurm.head)),
        *(_requeue_lines() if config.slurm.recovery == "requeue" else _chain_lines()),
        *(line for part in parts for line in _function(part)),
        _BODY.format(python=_python(config.slurm.head)),
    ]
    return "\n".join(lines)


def render_engines(config: Config, run_dir: RunDir) -> str:
    """The text of a script for engines that join a running run: a job of one node, or an array of such jobs.

    A job that ends by itself while it is being preempted is complete for Slurm, and never comes back. So an engine
    that was called away, and not cancelled, has its own job requeued: it joins again when there is room.

    Raises:
        UserError: the run directory's name can't be written into a script.
    """
    slurm, settings = config.slurm, config.slurm.inference
    share = dataclasses.replace(settings, nodes=1, gpus_per_node=config.inference.tensor_parallel)
    asked = _resources(config, share if settings.gpus_per_node else settings, 1) | {"ntasks-per-node": 1}
    common = {name: value for name, value in _common(config).items() if name != "no-requeue"}
    block = common | {"requeue": True} | asked | slurm.extra | settings.extra
    lines = [
        "#!/bin/bash",
        "# Engines that join a running run of specbatch, and may vanish at any time. `specbatch scale` submits them,",
        "# `sbatch --array=0-3 --partition=preempt engines.sbatch` by hand does, too.",
        "",
        *(f"#SBATCH {_directive(name, value)}" for name, value in block.items() if value is not None),
        "",
        f"run={shlex.quote(_root(run_dir))}",
        _LOG.format(log="engines.log"),
        _CLEAN.format(leftovers=_wrapped(LEFT_FROM_ELSEWHERE)),
        "# The engine hears TERM and USR2 itself; this script waits for it.",
        "trap : TERM USR2",
        *_srun(Part("engine", settings, 1, 1, ""), f"{_python(settings)} -u -m specbatch engine ."),
        AGAIN,
    ]
    return "\n".join(lines)


def parts_of(config: Config) -> list[Part]:
    """The components: head, inference, training."""
    slurm = config.slurm
    shares = slurm.head_on == "training"
    head = (1, 1)
    inference = (slurm.inference.nodes, config.inference.engines)
    training = (slurm.training.nodes, slurm.training.nodes)
    if slurm.layout == "het":
        groups = {"head": 0, "inference": 1, "training": 0 if shares else 2}
        where = {name: f"--het-group={group}" for name, group in groups.items()}
        where["head"] += " --relative=0" if shares else ""
    else:
        first = training[0] if shares else head[0]
        offsets = {"head": 0, "inference": first, "training": 0 if shares else first + inference[0]}
        where = {name: f"--relative={offset}" for name, offset in offsets.items()}
    if shares:
        where["head"] += " --overlap"
        where["training"] += " --overlap"
    counts = {"head": head, "inference": inference, "training": training}
    return [Part(name, getattr(slurm, name), *counts[name], where[name]) for name in counts]


def size(config: Config) -> int:
    """Components that Slurm sees."""
    return 1 if config.slurm.layout == "single" else 2 if config.slurm.head_on == "training" else 3


def requests(config: Config) -> dict[str, dict[str, Any]]:
    """The directives of each component that Slurm sees, by the component's name; None for one that is taken away."""
    slurm, parts = config.slurm, {part.name: part for part in parts_of(config)}
    # The batch script runs on the first component's first node, and the head wherever the script does.
    names = ["head", "inference", "training"] if slurm.head_on == "own" else ["training", "inference"]
    if slurm.layout == "single":
        asked = _resources(config, slurm.training, sum(parts[name].nodes for name in names))
        # All nodes are alike: each has room for the tasks of any component.
        tasks = max(map(_tasks_per_node, parts.values()))
        cpus = max(_tasks_per_node(part) * (part.settings.cpus_per_task or 0) for part in parts.values())
        asked |= {"ntasks-per-node": tasks, "cpus-per-task": -(-cpus // tasks) or None}
        return {"training": _common(config) | asked | slurm.extra | slurm.training.extra}
    found = {}
    for name in names:
        part = parts[name]
        asked = _resources(config, part.settings, part.nodes) | {"ntasks-per-node": _tasks_per_node(part)}
        found[name] = _common(config) | asked | slurm.extra | part.settings.extra
    return found


def _tasks_per_node(part: Part) -> int:
    return -(-part.tasks // part.nodes)


def _directives(config: Config) -> list[str]:
    lines: list[str] = []
    for index, block in enumerate(requests(config).values()):
        lines += ["", "#SBATCH hetjob"] if index else []
        lines += [f"#SBATCH {_directive(name, value)}" for name, value in block.items() if value is not None]
        if config.slurm.layout == "het" and not index:
            lines.append("# What the script prints goes to job.log in the run directory, whatever that is called.")
    return lines


def _common(config: Config) -> dict[str, Any]:
    """What all components ask for alike."""
    slurm = config.slurm
    requeue = {"requeue": True} if slurm.recovery == "requeue" else {"no-requeue": True}
    name = re.sub(r"[^\w.-]+", "-", config.run.name) or "specbatch"
    given = {"job-name": name, "account": slurm.account or None, "qos": slurm.qos or None, "time": slurm.time}
    return given | requeue | {"signal": f"USR2@{slurm.signal_s}", "output": "/dev/null", "open-mode": "append"}


def _resources(config: Config, settings: SlurmComponent, nodes: int) -> dict[str, Any]:
    slurm, gpus = config.slurm, settings.gpus_per_node
    asked: dict[str, Any] = {
        "partition": settings.partition or slurm.partition or None,
        "nodes": nodes,
        "cpus-per-task": settings.cpus_per_task,
        "mem": settings.mem or None,
        "constraint": settings.constraint or None,
    }
    if gpus and slurm.gpus == "gpus-per-node":
        asked["gpus-per-node"] = gpus
    elif gpus and slurm.gpus == "gres":
        asked["gres"] = f"gpu:{gpus}"
    return asked


def _directive(name: str, value: Any) -> str:
    if value is True:
        return f"--{name}"
    text = str(value)
    if re.search(r"[\n\r\0]", text):
        raise UserError(f"slurm: the directive {name} has a line break in its value, which no batch script can hold")
    if re.fullmatch(r"[^\s\"'\\#]+", text):
        return f"--{name}={text}"
    escaped = re.sub(r'(["\\])', r"\\\1", text)
    return f'--{name}="{escaped}"'


def _wrapped(words: str) -> str:
    return " \\\n    ".join(textwrap.wrap(words, 110))


def _python(settings: SlurmComponent) -> str:
    return shlex.quote(settings.python or sys.executable)


def _function(part: Part) -> list[str]:
    """A bash function that runs a component once."""
    # submitit would fill in `%j` in the run directory's own name; it doesn't see that behind the working directory.
    command = f"{_python(part.settings)} -u -m submitit.core._submit /proc/self/cwd/submitit/{part.name}"
    return [f"{part.name}() {{", *(f"    {line}" for line in _srun(part, command)), "}", ""]


def _srun(part: Part, command: str) -> list[str]:
    """The lines that run a component's command on its nodes."""
    settings = part.settings
    options = [part.where] if part.where else []
    options += [f"--nodes={part.nodes}", f"--ntasks={part.tasks}"]
    if settings.cpus_per_task:
        options.append(f"--cpus-per-task={settings.cpus_per_task}")
    options += [shlex.quote(option) for option in settings.srun]
    inside = "\n".join([*settings.setup, f'exec {settings.launch} "$@"'.replace("exec  ", "exec ")])
    return [
        f"srun {' '.join(options)} --unbuffered --kill-on-bad-exit=0 \\",
        f"    bash -c {shlex.quote(inside)} {part.name} \\",
        f"    {command}",
    ]


def _root(run_dir: RunDir) -> str:
    root = str(run_dir.root)
    if re.search(r"[\n\r\0]", root):
        raise UserError("run.dir: has a line break in its name, which no batch script can hold: rename it")
    return root


def _chain_lines() -> list[str]:
    return [
        "# The components hear TERM and USR2 themselves and stop with a snapshot; this script waits for them. If the",
        "# job ends early, in whatever way, the successor that waits for its end goes on.",
        "trap : TERM USR2",
        "",
    ]


def _requeue_lines() -> list[str]:
    return [
        "# The components hear TERM and USR2 themselves and stop with a snapshot; this script waits for them, and the",
        "# end of the attempt requeues the job. After a node failure Slurm requeues some components and forgets the",
        "# others: then, and only then, some are neither ended nor ending, and all have to be requeued from here.",
        "after_node_failure() {",
        "    sleep 0.3",
        '    if squeue --noheader --all --jobs="$SLURM_JOB_ID" --format=%T | grep -qE "^(RUNNING|PENDING)$"; then',
        '        scontrol requeue "$SLURM_JOB_ID"',
        "    fi",
        "}",
        "trap after_node_failure TERM",
        "trap : USR2",
        "# Steps of an attempt whose head's node was lost go on without it.",
        'if [ -n "${SLURM_RESTART_COUNT:-}" ]; then',
        "    steps=$(for id in ${!SLURM_JOB_ID_HET_GROUP_*}; do",
        '        squeue --noheader --steps --jobs="${!id}" --format=%i',
        "    done | grep -vE 'batch|extern')",
        '    [ -z "$steps" ] || scancel --signal=KILL $steps',
        "fi",
        "",
    ]


_LOG = """\
cd "$run" || exit 1
exec >>{log} 2>&1 </dev/null
"""

_CLEAN = """\
# Nothing of the shell that submitted.
unset {leftovers}
"""

AGAIN = """\
code=$?
# 75: it was called away, and the run goes on. For Slurm, what is being preempted runs, and what was cancelled does not.
# An element of an array may have the array's own id.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
if [ "$code" = 75 ] && [ "$(squeue --noheader --all --jobs="$job" --format=%T)" = RUNNING ]; then
    scontrol requeue "$job"
fi
exit $code
"""

_PRELUDE = """\
export SUBMITIT_EXECUTOR=slurm

# Its number, unless there is nothing to do: the run is cancelled or complete (3), or can't go on like this (1).
attempt=$({python} -m specbatch.launch.slurm.attempt begin "$run")
case $? in
0) export SPECBATCH_ATTEMPT=$attempt ;;
3) exit 0 ;;
*) exit 1 ;;
esac
"""

_BODY = """\
# A component that ends without a word is started again, as long as that helps.
keep() {{
    local starts=0
    SPECBATCH_STARTS=$starts "$1"
    while {python} -m specbatch.launch.slurm.attempt again "$run" "$attempt" "$1" $starts; do
        starts=$((starts + 1))
        SPECBATCH_STARTS=$starts "$1"
    done
}}

keep inference &
engines=$!
keep training &
trainers=$!
head &
head=$!
# The head ends last, except those that nobody can tell anything any more: they are given a moment. A signal that is
# caught ends a wait.
while kill -0 $head 2>/dev/null; do wait $head; done
for ((i = 0; i < 100; i++)); do
    kill -0 $engines 2>/dev/null || kill -0 $trainers 2>/dev/null || break
    sleep 0.1
done
{python} -m specbatch.launch.slurm.attempt end "$run" "$attempt"
exit $?
"""
