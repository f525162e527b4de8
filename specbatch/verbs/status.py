"""``specbatch status``."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbatch.rundir import EVALUATION_LOG, as_typed
from specbatch.verbs.options import no_more, run_dir_of, verb_parser

if TYPE_CHECKING:
    from specbatch.run.run_status import RunFiles, RunStatus
    from specbatch.run.status_details import PastAttempt
    from specbatch.slurm.query import SlurmJobs
    from specbatch.status_file import AnswerCounts, Status

LOOK_S = 2.0
"""Interval at which the runs' files are read, while watching."""
ASK_S = 20.0
"""Interval at which Slurm is asked, while watching; longer, because it has other users."""
EXPLAINED = ("pending", "stopped", "failed", "cancelled", "stuck", "gone")
"""States that need a reason."""


def status(arguments: list[str]) -> int:
    """Print the state of all runs, or of one in detail."""
    parser = verb_parser(status)
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="A run directory; all runs if not given.")
    parser.add_argument("--watch", action="store_true", help="Refresh until Ctrl-C; Slurm is asked every 20 s.")
    parser.add_argument("--json", action="store_true", help="Print JSON, for scripts.")
    options = no_more(status, parser, arguments)
    look = _Look(options.run)
    if not options.watch:
        print(look.json() if options.json else "\n".join(look.lines()))
        return 0
    while True:
        text = look.json() if options.json else "\n".join(look.lines())
        # Home, and clear what follows: a screen that is rewritten in place does not flicker.
        print(f"\x1b[H\x1b[J{text}" if sys.stdout.isatty() else text, flush=True)
        time.sleep(LOOK_S)


class _Look:
    """Reads the state of one run or of all, repeatedly."""

    def __init__(self, run: Path | None) -> None:
        self._run = run
        self._answer: SlurmJobs | None = None
        self._asked = 0.0

    def lines(self) -> list[str]:
        """For people."""
        files, answer = self._see()
        note = (
            [f"Slurm gave no answer ({answer.problem}): this is what the runs' own files say"] if answer.problem else []
        )
        if self._run is not None:
            return _detail_lines(self._run, files[0], answer) + note
        return (_table(_statuses(files, answer)) if files else ["there are no runs yet"]) + note

    def json(self) -> str:
        """For scripts."""
        files, answer = self._see()
        found = [dataclasses.asdict(stand) for stand in _statuses(files, answer)]
        if self._run is None:
            return json.dumps({"runs": found, "slurm": answer.problem or "answered"}, indent=2)
        return json.dumps({**found[0], **_details(files[0], answer), "slurm": answer.problem or "answered"}, indent=2)

    def _see(self) -> tuple[list[RunFiles], SlurmJobs]:
        from specbatch.known_runs import known_runs
        from specbatch.run.run_status import read_files
        from specbatch.slurm.query import query_jobs

        runs = known_runs() if self._run is None else [run_dir_of(self._run)]
        files = [read_files(run) for run in runs]
        if self._answer is None or time.monotonic() - self._asked > ASK_S:
            jobs = [job.id for each in files for job in each.jobs]
            users = {each.run_dir.root.stat().st_uid for each in files if each.jobs}
            self._answer, self._asked = query_jobs(jobs, users), time.monotonic()
        return files, self._answer


def _statuses(files: list[RunFiles], answer: SlurmJobs) -> list[RunStatus]:
    from specbatch.run.run_status import run_status

    now = time.time()
    return [run_status(each, answer, now) for each in files]


def _table(runs: list[RunStatus]) -> list[str]:
    head = ["NAME", "STATE", "STAGE", "STEP", "TOKENS/S", "LOSS", "ATTEMPT", "USED", "LEFT", "TO GO", "NODE-H", "RUN"]
    rows = [head] + [
        [
            run.name,
            run.state,
            run.stage or "-",
            f"{run.step}/{run.steps}" if run.steps else "-",
            _number(run.tokens_per_s),
            _number(run.loss, 3),
            str(run.attempt or "-"),
            _span(run.used_s),
            _span(run.left_s),
            _span(run.to_go_s),
            _number(run.node_hours, 1),
            as_typed(Path(run.run)),
        ]
        for run in runs
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for number, run in reversed([*enumerate(runs, 1)]):
        if run.why and run.state in EXPLAINED:
            lines.insert(number + 1, f"  {run.why.splitlines()[0]}")
    return lines


def _details(files: RunFiles, answer: SlurmJobs) -> dict[str, Any]:
    """What is shown of a single run only, for scripts."""
    import msgspec

    from specbatch.run import status_details

    stand = _statuses([files], answer)[0]
    broken = status_details.failure(files, stand)
    return {
        "components": [dataclasses.asdict(each) for each in status_details.components(files, answer)],
        "attempts": [dataclasses.asdict(each) for each in status_details.attempts(files, answer, stand)],
        "failure": dataclasses.asdict(broken) if broken else None,
        "head": msgspec.to_builtins(files.current),
    }


def _detail_lines(path: Path, files: RunFiles, answer: SlurmJobs) -> list[str]:
    from specbatch.recorded_plan import recording_source
    from specbatch.run import status_details
    from specbatch.training.observers.tracked import sync_command

    run = _statuses([files], answer)[0]
    lines = [f"{path}: {', '.join(_summary(run))}"]
    lines += [f"  {line}" for line in run.why.splitlines()[:1] if run.state != "completed"]
    if run.used_s is not None:
        left = f", {_span(run.left_s)} left" if run.left_s is not None else ""
        lines.append(f"  time      {_span(run.used_s)} used{left}; {_number(run.node_hours, 1)} node-hours in all")
    for part in status_details.components(files, answer):
        where = f" on {part.nodes}" if part.nodes else ""
        why = f" ({part.why})" if part.why else ""
        lines.append(f"  job       {part.job} {part.name}: {part.state}{why}{where}, partition {part.partition}")
    source = recording_source(files.run_dir)
    if source is not None:
        last = source.first + source.count - 1
        lines.append(f"  trains on the recorded steps {source.first} to {last} of {as_typed(Path(source.run))}")
    elif files.current is not None and run.state in ("running", "stopping"):
        answering = run.stage == "answering"
        lines += _engine_lines(files.current, "prompts") if answering else _head_lines(files.current)
    if files.current is not None:
        lines += _answer_lines(files.current.answers) + _trouble_lines(files.current)
    if command := sync_command(files.run_dir):
        lines.append(f"  wandb     {command}")
    lines += [f"  attempt   {_attempt(past)}" for past in status_details.attempts(files, answer, run)]
    lines += _measured_lines(files, answer)
    broken = status_details.failure(files, run)
    if broken is not None:
        lines.append(f"  {broken.component} failed: {broken.why}" if broken.why else f"  {broken.component} failed")
        lines.append(
            f"  the end of {as_typed(Path(broken.log))}:" if broken.lines else f"  it left no log in {broken.log}"
        )
        lines += [f"    {line}" for line in broken.lines]
    if run.state in ("stopped", "failed", "gone") and not files.only_measures:
        lines.append(f"  go on with: specbatch resume {shlex.quote(str(path))}")
    return lines


def _measured_lines(files: RunFiles, answer: SlurmJobs) -> list[str]:
    """The draft's measurement, or the end of the log of the job that failed to make one."""
    from specbatch.evaluation.summary import summary_line
    from specbatch.process_log import log_tail
    from specbatch.run.logs import last_job
    from specbatch.run.run_status import measurement
    from specbatch.run.status_details import TAIL_LINES
    from specbatch.rundir import read_json

    lines, found = [], read_json(files.run_dir.evaluation)
    if found is not None:
        lines.append(f"  measured  {summary_line(found, Path(found['draft']))}")
    state, why = measurement(files, answer, time.time())
    if state in ("failed", "cancelled"):
        log = files.run_dir.root / EVALUATION_LOG
        lines.append(f"  measured  {why}; the end of {as_typed(log)}:")
        lines += [f"    {line}" for line in log_tail(log, TAIL_LINES, begin=last_job(log) if log.exists() else 0)]
    return lines


def _trouble_lines(head: Status) -> list[str]:
    """Problems that the head reports."""
    lines = [f"  void      pack {void.pack} was not trained: {void.why}" for void in head.void]
    lines += [f"  TROUBLE   {trouble.what} can't be written: {trouble.why}" for trouble in head.troubles]
    refused = [f"{count} {what}" for what, count in head.refused.items() if count and what != "left"]
    return lines + ([f"  refused   {', '.join(refused)}: see SECURITY.md"] if refused else [])


def _summary(run: RunStatus) -> list[str]:
    parts = [run.state]
    parts += [run.stage] if run.stage else []
    parts += [f"step {run.step} of {run.steps}"] if run.steps else []
    parts += [f"attempt {run.attempt}"] if run.attempt else []
    parts += [f"job {run.job}"] if run.job else []
    parts += [f"loss {run.loss:.3f}"] if run.loss is not None else []
    if run.tokens_per_s is not None and run.used_s is not None:
        parts += [f"{run.tokens_per_s:.0f} tokens/s", f"{_span(run.to_go_s)} to go"]
    return parts


def _head_lines(head: Status) -> list[str]:
    """What the head reports about engines, the store, and who waits for whom."""
    store, window = head.store, head.window
    share = 100 * store.stored_bytes / store.budget_bytes if store.budget_bytes else 0.0
    lines = _engine_lines(head, "packs")
    lines[0] += f", {head.ranks} ranks joined"
    lines.append(
        f"  store     {share:.0f} % of {store.budget_bytes / 2**30:.2f} GiB; packs of the window: "
        f"{window.free} free, {window.claimed} claimed, {window.stored} stored"
    )
    waiting = [line for line in head.waiting if line.startswith("rank")] or ["no rank waits for a pack"]
    if head.idle:
        lines.append(f"  IDLE      {head.idle}")
    return lines + [f"  waiting   {line}" for line in waiting]


def _engine_lines(head: Status, works_on: str) -> list[str]:
    """The state of each engine."""
    ready = sum(engine.state == "ready" for engine in head.engines)
    return [f"  engines   {ready} of {len(head.engines)} ready"] + [
        f"            {each.name} {each.state}, {each.claims} {works_on} in work, {each.packs} done, "
        f"{each.tokens_per_s:.0f} tokens/s, heard {each.last_heard_s:.0f} s ago"
        for each in head.engines
    ]


def _answer_lines(answers: AnswerCounts | None) -> list[str]:
    """The state of the prompts that the run answers."""
    if answers is None:
        return []
    ways = ", ".join(f"{count:,} as {way}" for way, count in answers.ways.items())
    lines = [f"  answers   {answers.written:,} of {answers.of:,} written{f'; {ways}' if ways else ''}"]
    return lines + [f"            {count:,} none: {reason}" for reason, count in answers.refused.items()]


def _attempt(past: PastAttempt) -> str:
    began = datetime.datetime.fromtimestamp(past.began).strftime("%Y-%m-%d %H:%M:%S") if past.began else "unknown"
    parts = [f"{past.number}: {past.state}"]
    parts += [f"step {past.step}"] if past.step is not None else []
    parts += [f"began {began}"]
    parts += [f"took {_span(past.ended - past.began)}"] if past.began and past.ended else []
    parts += [f"job {past.job}" + (f", restart {past.restart}" if past.restart else "")] if past.job else []
    parts += [f"{name} on {','.join(nodes)}" for name, nodes in past.nodes.items()]
    return ", ".join(parts) + (f": {past.why.splitlines()[0]}" if past.why else "")


def _span(seconds: float | None) -> str:
    """``hours:minutes:seconds``, with days where there are some."""
    if seconds is None:
        return "-"
    days, rest = divmod(int(max(seconds, 0)), 86400)
    text = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{text}" if days else text


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
