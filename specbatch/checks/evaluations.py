"""The evaluations of a run: they have held-out data, can measure what is asked, and meet snapshots."""

from __future__ import annotations

from specbatch.config import Config
from specbatch.drafts.base import Algorithm
from specbatch.errors import UserError


def check_evaluate(config: Config) -> None:
    """Check that there are held-out data if anything is evaluated.

    Raises:
        UserError: there are none.
    """
    if config.evaluate.prompts and not config.data.heldout:
        raise UserError(
            f"evaluate.prompts: {config.evaluate.prompts} come from data.heldout, which is empty; name files "
            "there, or set evaluate.prompts: 0"
        )
    if config.training.evaluate_interval_steps and not config.data.heldout:
        raise UserError(
            f"training.evaluate_interval_steps: {config.training.evaluate_interval_steps}: evaluations use "
            "data.heldout, which is empty; name files there, or leave it out"
        )


def check_measurements(config: Config, algorithm: Algorithm) -> list[str]:
    """Check that engines can measure what is asked, and warn of what they would measure in vain.

    Raises:
        UserError: they can't.
    """
    from specbatch.evaluation.sets import read_sets
    from specbatch.evaluation.sweep import check_sweep

    if not config.evaluate.prompts:
        return []
    read_sets(config.evaluate.sets)
    return check_sweep(config, algorithm)


def warn_of_evaluations(config: Config) -> list[str]:
    """Warn if snapshots seldom fall on evaluated steps."""
    every, kept = config.training.evaluate_interval_steps, config.snapshot.interval.steps
    if every is None or kept is None or every % kept == 0 or kept % every == 0:
        return []
    return [
        f"training.evaluate_interval_steps: {every} and snapshot.interval: {kept} seldom meet, and only a "
        "snapshot of an evaluated step can be kept as the best; let one be a multiple of the other"
    ]
