"""Shows what the doctor's tasks found as a table and as rates, and remembers which profiles have passed."""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec

from specbatch import __version__
from specbatch.config import Config
from specbatch.doctor.finding import Finding, failed, read_findings
from specbatch.known_runs import state_folder
from specbatch.process_log import log_tail
from specbatch.rundir import read_json, write_json
from specbatch.slurm.parts import parts_of
from specbatch.timestamps import timestamp

RATES = "rates.json"
"""File in the doctor's directory that ``specbatch plan --like`` accepts."""


def collect(config: Config, root: Path, *, slurm: bool) -> dict[str, list[Finding]]:
    """Return what each component's tasks found; equal findings once, with the number of tasks.

    Args:
        slurm: whether the tasks belong to a job; else to this machine.
    """
    found: dict[str, list[Finding]] = {}
    for part in parts_of(config):
        tasks = part.tasks if slurm or part.name == "inference" else 1
        alike: dict[tuple[str, ...], list[tuple[int, str, Finding]]] = defaultdict(list)
        for task in range(tasks):
            findings = read_findings(root / "findings" / f"{part.name}-{task}.json")
            if findings is None:
                said = [line for line in log_tail(root / "doctor.log", 200) if part.name in line or "rror" in line]
                why = f"task {task} has no findings: {(said or ['doctor.log is empty'])[-1]}"
                findings = [failed("task", why, "findings of each task", "see doctor.log")]
            node = next((finding.found for finding in findings if finding.what == "node"), "")
            for finding in findings:
                if finding.what != "node":
                    key = (finding.what, finding.verdict, finding.found, finding.expected)
                    alike[key].append((task, node, finding))
        found[part.name] = [
            finding if len({task for task, _, _ in of}) == tasks else _on([node for _, node, _ in of], finding)
            for of in alike.values()
            for finding in [of[0][2]]
        ]
    return found


def _on(nodes: list[str], finding: Finding) -> Finding:
    """Return a finding with the names of its nodes."""
    named = list(dict.fromkeys(filter(None, nodes)))
    if not named:
        return finding
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    return msgspec.structs.replace(finding, found=f"{finding.found} (on {', '.join(named[:3])}{more})")


def works(found: dict[str, list[Finding]]) -> bool:
    """Return whether no finding would break the run."""
    return not any(finding.verdict == "failed" for findings in found.values() for finding in findings)


def as_json(found: dict[str, list[Finding]], root: Path) -> dict[str, Any]:
    """Return all findings, for scripts."""
    return {
        "works": works(found),
        "directory": str(root),
        "findings": {name: msgspec.to_builtins(findings) for name, findings in found.items()},
    }


def print_table(found: dict[str, list[Finding]]) -> None:
    """Print a table of all components: what, found, expected, what to do."""
    from rich.console import Console
    from rich.table import Table

    colors = {"ok": "green", "warning": "yellow", "failed": "red", "not checked": "dim"}
    console = Console()
    for name, findings in found.items():
        table = Table(title=name, title_justify="left", box=None, pad_edge=False, show_edge=False)
        for column in ("", "what", "found", "expected", "what to do"):
            table.add_column(column, overflow="fold")
        for finding in findings:
            mark = f"[{colors[finding.verdict]}]{finding.verdict}[/]"
            table.add_row(mark, *map(_plain, (finding.what, finding.found, finding.expected, finding.remedy)))
        console.print(table, end="\n\n")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def write_rates(found: dict[str, list[Finding]], root: Path) -> Path | None:
    """Write the measured rates of one engine and one rank; return the file, or None if there are none."""
    rates: dict[str, float] = {}
    for findings in found.values():
        for finding in findings:
            for name, value in finding.rates.items():
                # The slowest node counts.
                rates[name] = min(value, rates.get(name, value))
    if not rates:
        return None
    path = root / RATES
    write_json(path, {"measured": timestamp(), "version": __version__, **rates})
    return path


def passed(config: Config) -> bool:
    """Return whether a job of the doctor has passed for this profile and this version of specbatch."""
    with contextlib.suppress(OSError, RuntimeError, json.JSONDecodeError):
        return read_json(_mark(config)) is not None
    return False


def remember(config: Config) -> None:
    """Remember that a job has passed. A home directory that can't be written to is not an error."""
    with contextlib.suppress(OSError, RuntimeError):
        write_json(_mark(config), {"time": time.time()})


def _mark(config: Config) -> Path:
    """Return the file that marks this. Raises RuntimeError for a user without a home directory."""
    profile = Path(config.slurm.profile).stem or "no-profile"
    return state_folder() / "doctor" / f"{profile}-{__version__}.json"
