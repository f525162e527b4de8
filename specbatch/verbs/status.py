"""``specbatch status``."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbatch.verbs.options import no_more, run_dir_of, verb_parser

if TYPE_CHECKING:
    from specbatch.launch.details import Past
    from specbatch.launch.slurm.ask import Answer
    from specbatch.launch.standing import Files, Standing

LOOK_S = 2.0
"""Between two looks at the runs' files, while watching."""
ASK_S = 20.0
"""Between two questions to Slurm, while watching: it has other users."""
EXPLAINED = ("pending", "stopped", "failed", "cancelled", "stuck", "gone")
"""States that need a reason."""


def status(arguments: list[str]) -> int:
    """Say how all runs stand, or one in detail."""
    parser = verb_parser(status)
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="A run directory; all runs if not given.")
    parser.add_argument("--watch", action="store_true", help="Go on until Ctrl-C; Slurm is asked every 20 s.")
    parser.add_argument("--json", action="store_true", help="For scripts.")
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
    """Looks at one run or all, again and again."""

    def __init__(self, run: Path | None) -> None:
        self._run = run
        self._answer: Answer | None = None
        self._asked = 0.0

    def lines(self) -> list[str]:
        """For people."""
        files, answer = self._see()
        note = (
            [f"Slurm gave no answer ({answer.problem}): this is what the runs' own files say"] if answer.problem else []
        )
        if self._run is not None:
            return _detail_lines(self._run, files[0], answer) + note
        return (_table(_standings(files, answer)) if files else ["there are no runs yet"]) + note

    def json(self) -> str:
        """For scripts."""
        files, answer = self._see()
        found = [dataclasses.asdict(stand) for stand in _standings(files, answer)]
        if self._run is None:
            return json.dumps({"runs": found, "slurm": answer.problem or "answered"}, indent=2)
        return json.dumps({**found[0], **_details(files[0], answer), "slurm": answer.problem or "answered"}, indent=2)

    def _see(self) -> tuple[list[Files], Answer]:
        from specbatch.launch.slurm.ask import ask
        from specbatch.launch.standing import read_files
        from specbatch.registry import known_runs

        runs = known_runs() if self._run is None else [run_dir_of(self._run)]
        files = [read_files(run) for run in runs]
        if self._answer is None or time.monotonic() - self._asked > ASK_S:
            jobs = [job.id for each in files for job in each.jobs]
            users = {each.run_dir.root.stat().st_uid for each in files if each.jobs}
            self._answer, self._asked = ask(jobs, users), time.monotonic()
        return files, self._answer


def _standings(files: list[Files], answer: Answer) -> list[Standing]:
    from specbatch.launch.standing import standing

    now = time.time()
    return [standing(each, answer, now) for each in files]


def _table(runs: list[Standing]) -> list[str]:
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
            _shown(Path(run.run)),
        ]
        for run in runs
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for number, run in reversed([*enumerate(runs, 1)]):
        if run.why and run.state in EXPLAINED:
            lines.insert(number + 1, f"  {run.why.splitlines()[0]}")
    return lines


def _details(files: Files, answer: Answer) -> dict[str, Any]:
    """What is told of one run only, for scripts."""
    from specbatch.launch import details

    stand = _standings([files], answer)[0]
    broken = details.failure(files, stand)
    return {
        "components": [dataclasses.asdict(each) for each in details.components(files, answer)],
        "attempts": [dataclasses.asdict(each) for each in details.attempts(files, answer, stand)],
        "failure": dataclasses.asdict(broken) if broken else None,
        "head": files.current,
    }


def _detail_lines(path: Path, files: Files, answer: Answer) -> list[str]:
    from specbatch.launch import details

    run = _standings([files], answer)[0]
    lines = [f"{path}: {', '.join(_summary(run))}"]
    lines += [f"  {line}" for line in run.why.splitlines()[:1] if run.state != "completed"]
    if run.used_s is not None:
        left = f", {_span(run.left_s)} left" if run.left_s is not None else ""
        lines.append(f"  time      {_span(run.used_s)} used{left}; {_number(run.node_hours, 1)} node-hours in all")
    for part in details.components(files, answer):
        where = f" on {part.nodes}" if part.nodes else ""
        why = f" ({part.why})" if part.why else ""
        lines.append(f"  job       {part.job} {part.name}: {part.state}{why}{where}, partition {part.partition}")
    source = (files.status or {}).get("recording")
    if source is not None:
        last = source["first"] + source["count"] - 1
        lines.append(f"  trains on the recorded steps {source['first']} to {last} of {_shown(Path(source['run']))}")
    elif files.current is not None and run.state in ("running", "stopping"):
        lines += _head_lines(files.current)
    lines += [
        f"  void      pack {void['pack']} was not trained: {void['why']}"
        for void in (files.current or {}).get("void", [])
    ]
    lines += [
        f"  TROUBLE   {trouble['what']} can't be written: {trouble['why']}"
        for trouble in (files.current or {}).get("troubles", [])
    ]
    refused = {what: count for what, count in (files.current or {}).get("refused", {}).items() if count}
    if refused:
        lines.append(f"  refused   {', '.join(f'{count} {what}' for what, count in refused.items())}: see SECURITY.md")
    lines += [f"  attempt   {_attempt(past)}" for past in details.attempts(files, answer, run)]
    broken = details.failure(files, run)
    if broken is not None:
        lines.append(f"  {broken.component} failed: {broken.why}")
        lines.append(
            f"  the end of {_shown(Path(broken.log))}:" if broken.lines else f"  it left no log in {broken.log}"
        )
        lines += [f"    {line}" for line in broken.lines]
    if run.state in ("stopped", "failed", "gone"):
        lines.append(f"  go on with: specbatch resume {shlex.quote(str(path))}")
    return lines


def _summary(run: Standing) -> list[str]:
    parts = [run.state]
    parts += [run.stage] if run.stage else []
    parts += [f"step {run.step} of {run.steps}"] if run.steps else []
    parts += [f"attempt {run.attempt}"] if run.attempt else []
    parts += [f"job {run.job}"] if run.job else []
    parts += [f"loss {run.loss:.3f}"] if run.loss is not None else []
    if run.tokens_per_s is not None and run.used_s is not None:
        parts += [f"{run.tokens_per_s:.0f} tokens/s", f"{_span(run.to_go_s)} to go"]
    return parts


def _head_lines(head: dict[str, Any]) -> list[str]:
    """What the head says of engines, the store, and who waits for whom."""
    engines, store, window = head["engines"], head["store"], head["window"]
    ready = sum(engine["state"] == "ready" for engine in engines)
    share = 100 * store["stored_bytes"] / store["budget_bytes"] if store["budget_bytes"] else 0.0
    lines = [f"  engines   {ready} of {len(engines)} ready, {head['ranks']} ranks joined"]
    lines += [
        f"            {each['name']} {each['state']}, {each['claims']} packs in work, {each['packs']} done, "
        f"{each['tokens_per_s']:.0f} tokens/s, heard {each['last_heard_s']:.0f} s ago"
        for each in engines
    ]
    lines.append(
        f"  store     {share:.0f} % of {store['budget_bytes'] / 2**30:.2f} GiB; packs of the window: "
        f"{window['free']} free, {window['claimed']} claimed, {window['stored']} stored"
    )
    waiting = [line for line in head["waiting"] if line.startswith("rank")] or ["nobody waits for a pack"]
    return lines + [f"  waiting   {line}" for line in waiting]


def _attempt(past: Past) -> str:
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


def _shown(path: Path) -> str:
    """As the user would type it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
