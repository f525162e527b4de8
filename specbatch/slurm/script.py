"""Renders the batch script of a run, and the script of one attempt on nodes that are allocated already.

People can also read it, edit it, and submit it by hand. `directives` has what the components request from Slurm,
`steps` how their programs are started. It relies on these facts about Slurm: TERM and USR2 reach the programs
themselves; when the script ends, Slurm ends the rest of the job.
"""

from __future__ import annotations

from specbatch.config import Config
from specbatch.rundir import JOB_LOG, RunDir
from specbatch.slurm.directives import directives
from specbatch.slurm.parts import JobPart, parts_of
from specbatch.slurm.preamble import beginning
from specbatch.slurm.steps import component_function, outer_python

SCRIPT = "job.sbatch"
"""Name of the script in the run directory."""


def render(config: Config, run_dir: RunDir) -> str:
    """Return the text of ``job.sbatch``.

    Raises:
        UserError: the run directory's name can't be written into a script.
    """
    about = [
        f"A run of specbatch: {_name(config)}. Submit it with `specbatch submit`,",
        "or by hand with `sbatch job.sbatch`, which is the same.",
    ]
    lines = [
        *beginning(about, directives(config), run_dir, JOB_LOG),
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
    about = [f"An attempt of a run of specbatch, {_name(config)}, on the nodes of an allocation."]
    lines = [*beginning(about, [], run_dir, JOB_LOG), _IN_ALLOCATION, *_components(config, run_dir)]
    return "\n".join(lines)


def _name(config: Config) -> str:
    """The run's name in one line."""
    return " ".join(config.run.name.split())


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


def _function(part: JobPart, run_dir: RunDir) -> list[str]:
    """Return the function that runs a Python module on a component, and one that runs the component once."""
    # submitit would replace `%j` in the run directory's name, so the path goes through the working directory.
    own = f"on_{part.name} submitit.core._submit /proc/self/cwd/submitit/{part.name}"
    return [*component_function(part, run_dir)[:-1], f"{part.name}() {{ {own}; }}", ""]


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
