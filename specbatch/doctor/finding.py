"""The result of a check of a node or a component."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import msgspec

from specbatch.errors import RunError, UserError

Verdict = Literal["ok", "warning", "failed", "not checked"]


class Finding(msgspec.Struct, frozen=True):
    """One line of the doctor's table."""

    what: str
    found: str
    expected: str = ""
    remedy: str = ""
    """What to do; empty if nothing has to be done."""
    verdict: Verdict = "ok"
    rates: dict[str, float] = {}
    """Measured rates by name, in operations, bytes or tokens per second."""


def guarded(what: str, check: Callable[[], Finding | Iterable[Finding]]) -> list[Finding]:
    """Return what a check finds; an exception becomes a finding, too.

    Args:
        what: name of the check, for an exception.
    """
    findings: list[Finding] = []
    try:
        found = check()
        for finding in [found] if isinstance(found, Finding) else found:
            findings.append(finding)
    except (UserError, RunError) as error:
        findings.append(failed(what, str(error)))
    except Exception as error:
        findings.append(failed(what, f"{type(error).__name__}: {error}"))
    return findings


def failed(what: str, found: str, expected: str = "", remedy: str = "") -> Finding:
    """Return a finding about what would break the run."""
    return Finding(what, found, expected, remedy, "failed")


def not_checked(what: str, why: str) -> Finding:
    """Return a finding about a check that could not be made."""
    return Finding(what, why, verdict="not checked")


def write_findings(path: Path, findings: list[Finding]) -> None:
    """Write findings into a file that `read_findings` reads."""
    from specbatch.rundir import write_whole

    write_whole(path, msgspec.json.format(msgspec.json.encode(findings)))


def read_findings(path: Path) -> list[Finding] | None:
    """Return the written findings; None if there are none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Finding])
    except FileNotFoundError:
        return None
