"""Renders the batch script of a run: what each component requests from Slurm, and how its programs are started.

People can also read it, edit it, and submit it by hand. It relies on these facts about Slurm: most directives of a
heterogeneous job are inherited from component to component, so each component repeats all of its own; TERM and USR2
reach the programs themselves; when the script ends, Slurm ends the rest of the job.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specbatch.config import Config
from specbatch.config.engine_nodes import gpus_of_engine, nodes_per_engine
from specbatch.config.sections import SlurmComponent
from specbatch.errors import UserError
from specbatch.rundir import JOB_LOG, RunDir

SCRIPT = "job.sbatch"
"""Name of the script in the run directory."""
CANNOT_START = 126
"""Exit code of a component that could not be started; another is 127, bash's own for a missing program."""
LEFT_FROM_ELSEWHERE = (
    "SLURM_CPU_BIND SLURM_CPU_BIND_TYPE SLURM_CPU_BIND_LIST SLURM_CPU_BIND_VERBOSE SLURM_CPUS_PER_TASK "
    "SLURM_DISTRIBUTION SLURM_EXACT SLURM_EXCLUSIVE SLURM_GPUS_PER_TASK SLURM_HINT SLURM_KILL_BAD_EXIT "
    "SLURM_NPROCS SLURM_NTASKS SLURM_NTASKS_PER_NODE SLURM_OPEN_MODE SLURM_OVERLAP SLURM_THREADS_PER_CORE "
    "SLURM_TRES_PER_TASK SLURM_UNBUFFEREDIO SLURM_WAIT "
    "http_proxy https_proxy all_proxy ftp_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY FTP_PROXY"
)
"""Variables that the submitting shell may have set for itself: options that srun would apply to our steps, and proxies,
through which components would not reach each other."""


@dataclass(frozen=True)
class JobPart:
    """A component's place in the job."""

    name: str
    settings: SlurmComponent
    nodes: int
    tasks: int
    where: str
    """Options of srun that choose its nodes."""


def render(config: Config, run_dir: RunDir) -> str:
    """Return the text of ``job.sbatch``.

    Raises:
        UserError: the run directory's name can't be written into a script.
    """
    lines = [
        "#!/bin/bash",
        f"# A run of specbatch: {' '.join(config.run.name.split())}. Submit it with `specbatch submit`,",
        "# or by hand with `sbatch job.sbatch`, which is the same.",
        "",
        *directives(config),
        "",
        *preamble(run_dir, JOB_LOG),
        _PRELUDE.format(python=outer_python(config)),
        *(_requeue_lines() if config.slurm.recovery == "requeue" else _waiting_lines(config.slurm.recovery)),
        *_components(config, run_dir),
    ]
    return "\n".join(lines)


def render_attempt(config: Config, run_dir: RunDir) -> str:
    """Return the text of a script that runs one attempt on the nodes of an allocation. The environment has its number.

    Raises:
        UserError: the run directory's name can't be written into a script.
    """
    lines = [
        "#!/bin/bash",
        f"# An attempt of a run of specbatch, {' '.join(config.run.name.split())}, on the nodes of an allocation.",
        "",
        *preamble(run_dir, JOB_LOG),
        _IN_ALLOCATION,
        *_components(config, run_dir),
    ]
    return "\n".join(lines)


def _components(config: Config, run_dir: RunDir) -> list[str]:
    """The lines that have all components run, from the look at their nodes to the attempt's end."""
    parts, trains = parts_of(config), config.run.goal == "draft"
    return [
        *(line for part in parts for line in _function(part, run_dir)),
        _BODY.format(
            python=outer_python(config),
            components=" ".join(part.name for part in parts),
            fine=" ".join("0" for _ in parts),
            training=_TRAINERS if trains else "",
            alive=" || kill -0 $trainers 2>/dev/null" if trains else "",
        ),
    ]


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
    asked = _resources(config, share if settings.gpus_per_node else settings, nodes) | {"ntasks-per-node": tasks}
    common = {name: value for name, value in common_directives(config).items() if name != "no-requeue"}
    common |= {"job-name": f"{job_name(config)}-engine", "output": output_path(run_dir, "engines.log")}
    block = common | {"requeue": True} | asked | slurm.extra | settings.extra
    lines = [
        "#!/bin/bash",
        "# Engines that join a running run of specbatch, and may vanish at any time. `specbatch scale` submits them;",
        "# by hand, use `sbatch --array=0-3 --partition=preempt engines.sbatch`.",
        "",
        *(f"#SBATCH {directive(name, value)}" for name, value in block.items() if value is not None),
        "",
        *preamble(run_dir, "engines.log"),
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


def parts_of(config: Config) -> list[JobPart]:
    """Return the components: head, inference, training; only the first two if the run only answers prompts."""
    slurm = config.slurm
    counts = {
        "head": (1, 1),
        "inference": (slurm.inference.nodes, config.inference.engines * nodes_per_engine(config)),
        "training": (slurm.training.nodes, slurm.training.nodes),
    }
    if config.run.goal == "answers":
        del counts["training"]
    host = _host_of_head(config)
    if component_count(config) > 1:
        names = [name for name in counts if name not in ("head", host)]
        groups = {"head": 0} | dict(zip([*([host] if host else []), *names], range(0 if host else 1, 3), strict=False))
        where = {name: f"--het-group={groups[name]}" for name in counts}
        where["head"] += " --relative=0" if host else ""
    else:
        first = counts[host or "head"][0]
        offsets = {"head": 0, "inference": first, "training": first + counts["inference"][0]}
        if host:
            offsets[host] = 0
        where = {name: f"--relative={offsets[name]}" for name in counts}
    if host:
        where["head"] += " --overlap"
        where[host] += " --overlap"
    return [JobPart(name, getattr(slurm, name), *counts[name], where[name]) for name in counts]


def _host_of_head(config: Config) -> str:
    """Return the component on whose first node the head runs; empty if it has its own node."""
    if config.slurm.head_on == "own":
        return ""
    return "training" if config.run.goal == "draft" else "inference"


def component_count(config: Config) -> int:
    """Return the number of components that Slurm sees."""
    parts = 3 if config.run.goal == "draft" else 2
    return 1 if config.slurm.layout == "single" else parts - bool(_host_of_head(config))


def main_part(config: Config) -> str:
    """Return the component whose directives a single allocation uses."""
    return "training" if config.run.goal == "draft" else "inference"


def job_name(config: Config) -> str:
    """Return the common part of the names of the run's jobs."""
    return re.sub(r"[^\w.-]+", "-", config.run.name) or "specbatch"


def requests(config: Config) -> dict[str, dict[str, Any]]:
    """Return the directives of each component that Slurm sees, by the component's name; None for a removed
    directive."""
    slurm, parts = config.slurm, {part.name: part for part in parts_of(config)}
    # The batch script runs on the first component's first node, and the head wherever the script does.
    host, main = _host_of_head(config), main_part(config)
    names = [host, *(name for name in parts if name not in ("head", host))] if host else list(parts)
    if component_count(config) == 1:
        settings = parts[main].settings
        asked = _resources(config, settings, sum(parts[name].nodes for name in names))
        # All nodes are alike, so each needs room for the tasks of any component.
        tasks = max(map(_tasks_per_node, parts.values()))
        cpus = max(_tasks_per_node(part) * (part.settings.cpus_per_task or 0) for part in parts.values())
        asked |= {"ntasks-per-node": tasks, "cpus-per-task": -(-cpus // tasks) or None}
        return {main: common_directives(config) | asked | slurm.extra | settings.extra}
    found = {}
    for name in names:
        part = parts[name]
        asked = _resources(config, part.settings, part.nodes) | {"ntasks-per-node": _tasks_per_node(part)}
        asked["job-name"] = f"{job_name(config)}-{_SHORT[name]}"
        found[name] = common_directives(config) | asked | slurm.extra | part.settings.extra
    return found


def _tasks_per_node(part: JobPart) -> int:
    return -(-part.tasks // part.nodes)


_SHORT = {"head": "head", "inference": "engines", "training": "train"}
"""Suffixes of the job's name for each component, so that squeue shows which is which."""


def directives(config: Config) -> list[str]:
    """Return the lines that request the nodes of all components."""
    lines: list[str] = []
    for index, block in enumerate(requests(config).values()):
        lines += ["", "#SBATCH hetjob"] if index else []
        lines += [f"#SBATCH {directive(name, value)}" for name, value in block.items() if value is not None]
    return lines


def common_directives(config: Config) -> dict[str, Any]:
    """Return the directives that all components share."""
    slurm = config.slurm
    requeue = {"requeue": True} if slurm.recovery == "requeue" else {"no-requeue": True}
    given = {"account": slurm.account or None, "qos": slurm.qos or None, "time": slurm.time}
    output = {"output": output_path(RunDir(Path(config.run.dir).absolute()), JOB_LOG), "open-mode": "append"}
    return {"job-name": job_name(config)} | given | requeue | {"signal": f"USR2@{slurm.signal_s}"} | output


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


def preamble(run_dir: RunDir, log: str) -> list[str]:
    """Return the first lines of each script: it changes to the run directory, writes to its log there, and unsets
    variables of the submitting shell."""
    return [
        f"run={shlex.quote(_root(run_dir))}",
        _LOG.format(log=log),
        _CLEAN.format(leftovers=_wrapped(LEFT_FROM_ELSEWHERE)),
    ]


def output_path(run_dir: RunDir, name: str) -> str:
    """Return the file for the job's output, which ``scontrol show job`` shows; the script itself appends to it, too.

    In file names Slurm replaces ``%j`` and the like, and a backslash changes how. No name with these is used.
    """
    path = _root(run_dir) + f"/{name}"
    return path if re.fullmatch(r"[\w./+,:=@ -]+", path) else "/dev/null"


def directive(name: str, value: Any) -> str:
    """Format a directive of sbatch for a script.

    Raises:
        UserError: its value has a line break.
    """
    if value is True:
        return f"--{name}"
    text = str(value)
    if re.search(r"[\n\r\0]", text):
        raise UserError(
            f"slurm: the directive {name} has a line break in its value, which is impossible in a batch script"
        )
    if re.fullmatch(r"[^\s\"'\\#]+", text):
        return f"--{name}={text}"
    escaped = re.sub(r'(["\\])', r"\\\1", text)
    return f'--{name}="{escaped}"'


def _wrapped(words: str) -> str:
    return " \\\n    ".join(textwrap.wrap(words, 110))


def python_of(settings: SlurmComponent) -> str:
    """Return the Python command of a component, for bash."""
    return shlex.quote(settings.python or sys.executable)


def other_root(settings: SlurmComponent) -> bool:
    """Whether a component may run where the files of its node are not to be seen: in a container."""
    return bool(settings.launch) or any(option.startswith(_OF_CONTAINERS) for option in settings.srun)


_OF_CONTAINERS = ("--container-image", "--environment=")
"""Options that plug-ins of srun have for containers: pyxis, and CSCS's Container Engine."""


def outer_python(config: Config) -> str:
    """The Python of a job's script itself, for bash: the head's, or the one that submits where the head is in a
    container, in which Slurm's commands need not be."""
    return shlex.quote(sys.executable) if other_root(config.slurm.head) else python_of(config.slurm.head)


def component_function(part: JobPart, run_dir: RunDir) -> list[str]:
    """Return a bash function, named ``on_`` and the component, that runs a Python module in all its tasks."""
    lines = step_lines(part, f'{python_of(part.settings)} -u -m "$@"', run_dir)
    return [f"on_{part.name}() {{", *(f"    {line}" for line in lines), "}", ""]


def _function(part: JobPart, run_dir: RunDir) -> list[str]:
    """Return the same, and a function that runs the component once."""
    # submitit would replace `%j` in the run directory's name, so the path goes through the working directory.
    own = f"on_{part.name} submitit.core._submit /proc/self/cwd/submitit/{part.name}"
    return [*component_function(part, run_dir)[:-1], f"{part.name}() {{ {own}; }}", ""]


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
        f"{shlex.quote(_root(run_dir))} >&2; exit {CANNOT_START}; }}",
    ]
    if settings.setup:
        lines.append(_CHECKED)
    for line in settings.setup:
        lines += [line, f"checked $? {shlex.quote(line)}"]
    return "\n".join([*lines, f'exec {settings.launch} "$@"'.replace("exec  ", "exec ")])


def _root(run_dir: RunDir) -> str:
    root = str(run_dir.root)
    if re.search(r"[\n\r\0]", root):
        raise UserError("run.dir: has a line break in its name, which is impossible in a batch script; rename it")
    return root


def _waiting_lines(recovery: str) -> list[str]:
    then = "the successor that waits for its end continues" if recovery == "chain" else "`specbatch resume` continues"
    return [
        "# The components handle TERM and USR2 themselves and stop with a snapshot; this script waits for them. If the",
        f"# job ends early, for whatever reason, {then}.",
        "trap : TERM USR2",
        "",
    ]


def _requeue_lines() -> list[str]:
    return [
        "# The components handle TERM and USR2 themselves and stop with a snapshot. This script waits for them; the",
        "# end of the attempt requeues the job. After a node failure Slurm requeues some components and forgets the",
        "# others: then, and only then, some neither ended nor end, and all have to be requeued from here.",
        "after_node_failure() {",
        "    sleep 0.3",
        '    if squeue --noheader --all --jobs="$SLURM_JOB_ID" --format=%T | grep -qE "^(RUNNING|PENDING)$"; then',
        '        scontrol requeue "$SLURM_JOB_ID"',
        "    fi",
        "}",
        "trap after_node_failure TERM",
        "trap : USR2",
        "# Steps of an attempt whose head's node was lost keep running without it.",
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
ulimit -S -c 0
exec >>{log} 2>&1 </dev/null
"""

_CHECKED = f"""\
checked() {{ [ "$1" = 0 ] || {{ echo "$0: setup: on $(hostname), exit code $1: $2" >&2; exit {CANNOT_START}; }}; }}"""

_CLEAN = """\
# Unset variables of the submitting shell.
unset {leftovers}
"""

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

_PRELUDE = """\
export SUBMITIT_EXECUTOR=slurm

# Prints the attempt's number, unless the run is cancelled or complete (3), or can't continue (1).
attempt=$({python} -m specbatch.slurm.attempt begin "$run")
case $? in
0) export SPECBATCH_ATTEMPT=$attempt ;;
3) exit 0 ;;
*) exit 1 ;;
esac
"""

_IN_ALLOCATION = """\
export SUBMITIT_EXECUTOR=slurm
attempt=$SPECBATCH_ATTEMPT
# srun hands USR2 on to the components, which stop with a snapshot. So they do when the process that leads the run is
# gone, which has this process group to itself.
trap : TERM USR2
leader=$PPID
(
    trap '' USR2
    while kill -0 $leader 2>/dev/null; do sleep 1; done
    kill -USR2 0
) &
"""

_TRAINERS = """\
keep training &
trainers=$!
"""
_BODY = """\
# Check every node in seconds, before anything is loaded. A check that hangs does not count.
looks=()
took_ms=$(date +%s%3N)
for component in {components}; do
    on_$component specbatch.doctor.quick $component &
    looks+=($!)
done
for ((i = 0; i < 1200; i++)); do
    kill -0 "${{looks[@]}}" 2>/dev/null || break
    sleep 0.1
done
codes=()
for look in "${{looks[@]}}"; do
    kill -0 "$look" 2>/dev/null || wait "$look"
    codes+=($?)
done
took_ms=$(($(date +%s%3N) - took_ms))
took_s=$(printf '%d.%03d' $((took_ms / 1000)) $((took_ms % 1000)))
echo "$(date '+%F %T') specbatch: attempt $attempt: checked all nodes in $took_s s"
if [ "${{codes[*]}}" != "{fine}" ]; then
    {python} -m specbatch.slurm.attempt looked "$run" "$attempt" "${{codes[@]}}" || exit 1
fi

# Restart components that are killed, as long as that leads to progress.
keep() {{
    local starts=0
    SPECBATCH_STARTS=$starts "$1"
    while {python} -m specbatch.slurm.attempt again "$run" "$attempt" "$1" $starts $?; do
        starts=$((starts + 1))
        SPECBATCH_STARTS=$starts "$1"
    done
}}

keep inference &
engines=$!
{training}head &
head=$!
# The head ends last, except components that could not be told to end: they get a moment. A caught signal interrupts
# `wait`.
wait $head
code=$?
while kill -0 $head 2>/dev/null; do
    wait $head
    code=$?
done
for ((i = 0; i < 100; i++)); do
    kill -0 $engines 2>/dev/null{alive} || break
    sleep 0.1
done
{python} -m specbatch.slurm.attempt end "$run" "$attempt" $code
exit $?
"""
