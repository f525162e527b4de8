"""Durations in Slurm's formats."""

from __future__ import annotations

import re


def slurm_seconds(text: str) -> float | None:
    """Return the seconds of a time limit in one of Slurm's formats: ``minutes``, ``minutes:seconds``,
    ``hours:minutes:seconds``, ``days-hours``, ``days-hours:minutes``, ``days-hours:minutes:seconds``; None for anything
    else, such as ``UNLIMITED``. Fractions of a second are dropped."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?(?:(?<=:\d\d)\.\d+)?", text.strip())
    if found is None:
        return None
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None:
        hours, minutes, rest = first or 0, second or 0, third or 0
    elif third is not None:
        hours, minutes, rest = first or 0, second or 0, third
    else:
        hours, minutes, rest = 0, first or 0, second or 0
    return float((((days or 0) * 24 + hours) * 60 + minutes) * 60 + rest)


def slurm_time(limit_s: float) -> str:
    """Format a duration as Slurm does."""
    minutes, rest = divmod(int(limit_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02d}:{minutes:02d}:{rest:02d}" if days else f"{hours:02d}:{minutes:02d}:{rest:02d}"
