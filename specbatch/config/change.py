"""Defines which settings of a run may change when it is resumed, and which would change the training. Pure.

Everything is fixed that determines the samples of a step, what the target computes for them, and what the optimizer
does with it. The rest may change: hardware and its use, what is logged, kept and measured.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from specbatch.config.sections import Config
from specbatch.errors import UserError

FIXED_SECTIONS = ("target", "data", "draft", "training")
"""Sections whose fields are fixed, except those in `FREE`."""
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
    "training.metrics",
)
FIXED = ("run.dir", "run.seed", "run.goal", "inference.deterministic")
"""Fields of other sections that are fixed."""
STEPS = "training.max_steps"
"""Field that is fixed if the learning rate depends on the number of steps."""


@dataclass(frozen=True)
class Change:
    """A field whose value changed."""

    field: str
    was: Any
    now: Any


def changes(old: Config, new: Config) -> list[Change]:
    """Return the fields that differ, in their order."""
    found = []
    for section in dataclasses.fields(Config):
        before, now = getattr(old, section.name), getattr(new, section.name)
        found += [
            Change(f"{section.name}.{name}", getattr(before, name, None), getattr(now, name, None))
            # With another algorithm, the section of the draft has other fields.
            for name in dict.fromkeys(entry.name for entry in (*dataclasses.fields(before), *dataclasses.fields(now)))
            if getattr(before, name, None) != getattr(now, name, None)
        ]
    return found


def refuse_fixed(found: list[Change], schedule: str, trained: int) -> None:
    """Refuse changes that would change the training.

    Args:
        schedule: schedule of the learning rate.
        trained: number of trained steps.

    Raises:
        UserError: there are such changes; names all of them, with old and new value.
    """
    wrong = [change for change in found if _fixed(change, schedule)]
    if wrong:
        named = "; ".join(f"{change.field} was {change.was} and would be {change.now}" for change in wrong)
        why = ""
        if any(change.field == STEPS for change in wrong):
            why = f" (with training.schedule: {schedule} the learning rate of every step depends on their number)"
        raise UserError(
            f"{wrong[0].field}: can't change when a run is resumed, because it would be another training: "
            f"{named}{why}; "
            "leave it out, or start a new run with another run.dir"
        )
    for change in found:
        if change.field == STEPS and change.now is not None and change.now < trained:
            raise UserError(f"{STEPS}: {change.now} is less than the {trained} steps that are already trained")


def may_change(field: str) -> bool:
    """Return whether a field may ever change when a run is resumed."""
    section = field.partition(".")[0]
    return field == STEPS or not (field in FIXED or (section in FIXED_SECTIONS and field not in FREE))


def _fixed(change: Change, schedule: str) -> bool:
    return not may_change(change.field) or (change.field == STEPS and schedule != "constant")
