"""Which settings of a run may change where it goes on, and which make it another training. Pure.

What decides which samples a step has, what the target says of them, or what the optimizer does with that, stays as it
was when the run began. All else may change: how much hardware, how it is used, what is told, kept and measured.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from specbatch.config.sections import Config
from specbatch.errors import UserError

FIXED_SECTIONS = ("target", "data", "draft", "training")
"""Sections whose fields are fixed, but for those in `FREE`."""
FREE = (
    "target.trust_remote_code",
    "data.workers",
    "data.cache_dir",
    "data.max_bad_fraction",
    "training.ranks",
    "training.threads",
    "training.context_parallel",
    "training.prefetch_steps",
    "training.max_restarts",
    "training.not_finite",
    "training.evaluate_interval_steps",
)
FIXED = ("run.dir", "run.seed", "inference.deterministic")
"""Fields of other sections that are fixed."""
STEPS = "training.max_steps"
"""Fixed where the learning rate depends on the number of steps."""


@dataclass(frozen=True)
class Change:
    """A field that is not what it was."""

    field: str
    was: Any
    now: Any


def changes(old: Config, new: Config) -> list[Change]:
    """The fields that differ, in their order."""
    found = []
    for section in dataclasses.fields(Config):
        before, now = getattr(old, section.name), getattr(new, section.name)
        found += [
            Change(f"{section.name}.{entry.name}", getattr(before, entry.name), getattr(now, entry.name))
            for entry in dataclasses.fields(before)
            if getattr(before, entry.name) != getattr(now, entry.name)
        ]
    return found


def refuse_fixed(found: list[Change], schedule: str, trained: int) -> None:
    """Refuse changes that would make another training of it.

    Args:
        schedule: of the learning rate.
        trained: steps that are done.

    Raises:
        UserError: naming all of them, with the old and the new value.
    """
    wrong = [change for change in found if _fixed(change, schedule)]
    if wrong:
        named = "; ".join(f"{change.field} was {change.was} and would be {change.now}" for change in wrong)
        why = ""
        if any(change.field == STEPS for change in wrong):
            why = f" (with training.schedule: {schedule} the learning rate of every step depends on their number)"
        raise UserError(
            f"{wrong[0].field}: can't change where a run goes on, since it would be another training: {named}{why}; "
            "leave it out, or start a new run with another run.dir"
        )
    for change in found:
        if change.field == STEPS and change.now is not None and change.now < trained:
            raise UserError(f"{STEPS}: {change.now} is less than the {trained} steps that are trained already")


def may_change(field: str) -> bool:
    """Whether a field may ever change where a run goes on."""
    section = field.partition(".")[0]
    return field == STEPS or not (field in FIXED or (section in FIXED_SECTIONS and field not in FREE))


def _fixed(change: Change, schedule: str) -> bool:
    return not may_change(change.field) or (change.field == STEPS and schedule != "constant")
