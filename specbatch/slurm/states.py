"""Parses what squeue, sacct and scontrol say about a run's job, and derives the state of the whole job. Pure.

A heterogeneous job has several rows (``123+0``, ``123+1``), and so has an array (``123_4``). The first component, the
leader, has the state of the whole, with one exception: a leader that is pending while another component has ended waits
forever, because Slurm starts all components or none, and requeues only some of them after a node failure.
"""

from __future__ import annotations

import datetime
import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass

from specbatch.slurm.durations import slurm_seconds

SQUEUE_FORMAT = "%i|%A|%T|%r|%R|%M|%l|%S|%e|%P|%D|%V|%B"
"""Format for ``squeue --noheader`` that `parse_squeue` reads."""
SACCT_FIELDS = "JobID,JobIDRaw,State,ExitCode,Reason,Submit,Start,End,Elapsed,Timelimit,Partition,NNodes,NodeList"
"""Fields for ``sacct --parsable2 --format`` that `parse_sacct` reads; further fields do no harm."""

WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"})
ALIVE = frozenset(
    {
        "CONFIGURING", "EXPEDITING", "POWER_UP_NODE", "RESIZING", "RUNNING", "SIGNALING", "STAGE_OUT", "STOPPED",
        "SUSPENDED", "UPDATE_DB",
    }
)  # fmt: skip
ENDING = "COMPLETING"

REASONS = {
    "AssocGrpGRES": "the account's GPUs are all in use",
    "AssocMaxJobsLimit": "the account's limit of jobs at a time: a run counts as one job per component",
    "BadConstraints": "no node satisfies the constraint",
    "BeginTime": "Slurm waits a while before it restarts a requeued job",
    "Dependency": "it waits for the end of another job",
    "DependencyNeverSatisfied": "the job that it waits for ended otherwise, so it will never start; cancel it",
    "JobHeldAdmin": "an administrator holds it",
    "JobHeldUser": "it is held; release it with `scontrol release`",
    "PartitionConfig": "the partition does not allow so many nodes or so much time",
    "PartitionNodeLimit": "the partition does not allow so many nodes",
    "PartitionTimeLimit": "it asks for more time than the partition allows",
    "Priority": "jobs with higher priority come first",
    "QOSMaxGRESPerUser": "your limit of GPUs at a time",
    "QOSMaxJobsPerUserLimit": "your limit of jobs at a time: a run counts as one job per component",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "Resources": "it waits for nodes",
}
"""Explanations of Slurm's reasons; others are shown unchanged."""

ENDS = {
    "BOOT_FAIL": "a node did not boot",
    "CANCELLED": "it was cancelled",
    "COMPLETED": "its script ended",
    "DEADLINE": "its deadline passed",
    "FAILED": "its script failed",
    "NODE_FAIL": "a node failed",
    "OUT_OF_MEMORY": "it used more memory than it had requested",
    "PREEMPTED": "it was preempted",
    "REVOKED": "another cluster took it",
    "TIMEOUT": "it reached its time limit",
}
"""Explanations of how jobs end."""


NO_OUTPUT = "0:53"
"""Exit code of a job whose output file can't be opened on its node."""


@dataclass(frozen=True)
class JobRow:
    """One component of a job, or one element of an array, in one attempt."""

    job: int
    """Id of the whole job."""
    index: int
    """Number of the component or element; 0 in a plain job."""
    id: int
    """Id of this part."""
    state: str
    """Slurm's word."""
    reason: str = ""
    exit_code: str = ""
    """``status:signal``."""
    partition: str = ""
    nodes: str = ""
    """List of nodes in Slurm's notation; empty if there are none."""
    node_count: int = 0
    used_s: float = 0.0
    limit_s: float | None = None
    submitted: float | None = None
    """Seconds since 1970, like the times below."""
    started: float | None = None
    ended: float | None = None
    expected: float | None = None
    """When Slurm expects it to start, while it waits; None if Slurm has not planned so far ahead."""
    restarts: int | None = None
    """Restarts of the job; known from scontrol only."""
    user: int | None = None
    """User who cancelled the job; known from sacct only."""

    @property
    def over(self) -> bool:
        """Whether it has ended, and Slurm will not start it again."""
        return self.state not in WAITING and self.state not in ALIVE and self.state != ENDING


class Condition(enum.StrEnum):
    """The state of a job as a whole."""

    PENDING = "pending"
    RUNNING = "running"
    ENDING = "ending"
    STUCK = "stuck"
    """Pending forever."""
    OVER = "over"


@dataclass(frozen=True)
class JobState:
    """A job as a whole."""

    condition: Condition
    word: str
    """Slurm's word for the leader's state."""
    why: str
    """Why it is pending, stuck or over; empty if no explanation is needed."""
    rows: tuple[JobRow, ...]
    """Rows of its last attempt, the leader first."""

    @property
    def leader(self) -> JobRow:
        return self.rows[0]


def parse_squeue(text: str) -> list[JobRow]:
    """Parse the output of ``squeue --noheader --array --format=SQUEUE_FORMAT``."""
    rows = []
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) != SQUEUE_FORMAT.count("|") + 1:
            continue
        shown, own, state, reason, place, used, limit, start, end, partition, count, submitted, _ = fields
        job, index = _ids(shown)
        rows.append(
            JobRow(
                job, index, int(own), state,
                reason="" if reason == "None" else reason,
                partition=partition,
                nodes="" if place.startswith("(") else place,
                node_count=_count(count),
                used_s=slurm_seconds(used) or 0.0,
                limit_s=slurm_seconds(limit),
                submitted=_time(submitted),
                started=None if state in WAITING else _time(start),
                ended=None if state in WAITING or state in ALIVE else _time(end),
                expected=_time(start) if state in WAITING else None,
            )
        )  # fmt: skip
    return rows


def parse_sacct(text: str) -> list[JobRow]:
    """Parse ``sacct --allocations --duplicates --parsable2 --format=SACCT_FIELDS``; rows of steps are left out."""
    lines = text.splitlines()
    if not lines:
        return []
    names = lines[0].split("|")
    rows = []
    for line in lines[1:]:
        entry = dict(zip(names, line.split("|"), strict=False))
        if "." in entry["JobID"]:
            continue
        job, index = _ids(entry["JobID"])
        state, _, by = entry["State"].partition(" by ")
        reason, nodes = entry.get("Reason", ""), entry.get("NodeList", "")
        rows.append(
            JobRow(
                job, index, int(re.match(r"\d+", entry["JobIDRaw"])[0]), state,  # type: ignore[index]
                reason="" if reason == "None" else reason,
                exit_code=entry.get("ExitCode", ""),
                partition=entry.get("Partition", ""),
                nodes="" if nodes == "None assigned" else nodes,
                node_count=_count(entry.get("NNodes", "")),
                used_s=slurm_seconds(entry.get("Elapsed", "")) or 0.0,
                limit_s=slurm_seconds(entry.get("Timelimit", "")),
                submitted=_time(entry.get("Submit", "")),
                started=_time(entry.get("Start", "")),
                ended=_time(entry.get("End", "")),
                user=int(by) if by.isdigit() else None,
            )
        )  # fmt: skip
    return rows


def parse_scontrol(text: str) -> list[JobRow]:
    """Parse the output of ``scontrol show job J``."""
    rows = []
    for block in re.split(r"\n(?=JobId=)", text):
        # Names and paths may contain anything, so fields are only searched at the beginning of a line, where the needed
        # ones have always been, or after a field without blanks.
        first = re.match(
            r"JobId=(\d+)(?: ArrayJobId=(\d+) ArrayTaskId=(\d+)\S*)?(?: HetJobId=(\d+) HetJobOffset=(\d+))?", block
        )
        state = re.search(r"^\s+JobState=(\S+) Reason=(\S+)", block, re.M)
        if first is None or state is None:
            continue
        own, array, element, het, offset = first.groups()
        ran = re.search(r"^\s+RunTime=(\S+) TimeLimit=(\S+)", block, re.M)
        started = re.search(r"^\s+StartTime=(\S+) EndTime=(\S+)", block, re.M)
        restarts = re.search(r"^\s+Requeue=\S+ Restarts=(\d+) .*?ExitCode=(\S+)", block, re.M)
        word = state[1]
        rows.append(
            JobRow(
                int(het or array or own), int(offset or element or 0), int(own), word,
                reason="" if state[2] == "None" else state[2],
                exit_code=restarts[2] if restarts else "",
                partition=_field(block, "Partition"),
                nodes=_field(block, "NodeList"),
                node_count=_count(_field(block, "NumNodes")),
                used_s=(slurm_seconds(ran[1]) or 0.0) if ran else 0.0,
                limit_s=slurm_seconds(ran[2]) if ran else None,
                submitted=_time(_field(block, "SubmitTime")),
                started=_time(started[1]) if started and word not in WAITING else None,
                ended=_time(started[2]) if started and word not in WAITING and word not in ALIVE else None,
                restarts=int(restarts[1]) if restarts else None,
            )
        )  # fmt: skip
    return rows


def newest(rows: Iterable[JobRow]) -> list[JobRow]:
    """Return the rows of each component's last attempt, in the order of components."""
    found: dict[int, JobRow] = {}
    for row in sorted(rows, key=lambda row: row.submitted or 0.0):
        found[row.index] = row
    return [found[index] for index in sorted(found)]


def job_state(rows: Iterable[JobRow], size: int = 1) -> JobState | None:
    """Return the state of a heterogeneous or plain job; None if it has no rows.

    Args:
        rows: rows of one job, from one source.
        size: number of its components. Those without a row have ended and been forgotten.
    """
    last = newest(rows)
    if not last:
        return None
    leader, parts = last[0], tuple(last)
    over = [row for row in last if row.over]
    if leader.index != 0 or leader.over:
        return JobState(Condition.OVER, leader.state, _end(last), parts)
    if leader.state in ALIVE:
        return JobState(Condition.RUNNING, leader.state, "; ".join(map(_lost, over)), parts)
    if leader.state == ENDING:
        return JobState(Condition.ENDING, leader.state, leader.reason, parts)
    if over or len(last) < size:
        which = "; ".join(map(_lost, over)) or f"{size - len(last)} of its {size} components have ended"
        why = f"{which}: it will never start by itself; restart all of it with `scontrol requeue {leader.job}`"
        return JobState(Condition.STUCK, leader.state, why, parts)
    return JobState(Condition.PENDING, leader.state, why_pending(last), parts)


def why_pending(rows: list[JobRow]) -> str:
    """Return Slurm's reasons with explanations, and the component that each belongs to if they differ."""
    reasons: dict[str, list[JobRow]] = {}
    for row in rows:
        if row.state in WAITING and row.reason:
            reasons.setdefault(row.reason, []).append(row)
    shown = []
    for reason, of in reasons.items():
        # Slurm appends node names after a comma.
        meaning = REASONS.get(reason.split(",")[0].split(" ")[0])
        text = f"{reason}: {meaning}" if meaning else reason
        if len(reasons) > 1:
            text = f"component {', '.join(str(row.index) for row in of)} {text}"
        shown.append(text)
    expected = [row.expected for row in rows if row.expected is not None]
    if expected:
        # The components start together, so the last one decides.
        latest = datetime.datetime.fromtimestamp(max(expected))
        shown.append(f"Slurm expects it to start at {latest:%Y-%m-%d %H:%M}")
    going = [str(row.index) for row in rows if row.state in ALIVE]
    if going:
        shown.append(f"component {', '.join(going)} still exists and waits for the others")
    return "; ".join(shown)


def _end(rows: list[JobRow]) -> str:
    """Return why a job is over: the leader's end, and those of others that differ."""
    leader = rows[0]
    words = [end_of(leader)] + [_lost(row) for row in rows[1:] if row.over and row.state != leader.state]
    return "; ".join(words)


def end_of(row: JobRow) -> str:
    """Return how a component ended: Slurm's word, and an explanation."""
    text = f"{row.state}: {ENDS.get(row.state, 'it ended')}"
    if row.user is not None:
        text += f" by user {row.user}"
    if row.state == "FAILED" and row.exit_code == NO_OUTPUT:
        return "FAILED: its node could not open the job's output in the run directory: does that node see it?"
    if row.state == "FAILED" and row.exit_code not in ("", "0:0"):
        status, _, number = row.exit_code.partition(":")
        text += f" with exit code {status}" if number in ("", "0") else f", killed by signal {number}"
    return text


def _lost(row: JobRow) -> str:
    where = f" on {row.nodes}" if row.nodes else ""
    return f"component {row.index}{where} is {row.state}"


def _ids(shown: str) -> tuple[int, int]:
    """Parse the id of the whole and the number of the part: ``123``, ``123+1``, ``123_4``, ``123_[4-7%2]``."""
    found = re.match(r"(\d+)(?:[+_]\[?(\d+))?", shown)
    if found is None:
        raise ValueError(f"{shown!r} is not a Slurm job id")
    return int(found[1]), int(found[2] or 0)


def _field(block: str, name: str) -> str:
    """Return a field of scontrol that begins a line and has no blanks."""
    found = re.search(rf"^\s+{name}=(\S*)", block, re.M)
    return "" if found is None or found[1] == "(null)" else found[1]


def _count(text: str) -> int:
    """Parse a number of nodes; scontrol writes ``2-4`` for a range, and ``1K`` for large numbers."""
    found = re.match(r"(\d+)(K?)", text)
    return int(found[1]) * (1024 if found[2] else 1) if found else 0


def _time(text: str) -> float | None:
    """Convert Slurm's local time to seconds since 1970; None for ``N/A`` and ``Unknown``."""
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
