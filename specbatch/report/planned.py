"""The planner's figures for a run, which the report shows next to the measured ones. The report uses the planner only
here."""

from __future__ import annotations

from dataclasses import dataclass

from specbatch.errors import RunError, UserError
from specbatch.report.reading import RunRecord


@dataclass(frozen=True)
class Planned:
    """The planner's numbers for a whole run."""

    steps: int
    tokens: int
    seconds: float
    """Seconds from the first pack to the last step."""
    trainer_tokens_per_s: float
    """Speed of all ranks together."""
    engine_tokens_per_s: float
    """Speed of one engine."""
    source: str
    """Source of the trainers' rate."""


def planned(run: RunRecord) -> Planned | str:
    """Plan a run by its own configuration and prepared data, with assumed speeds of GPUs.

    Nothing is prepared: if the data or the target no longer exist, a sentence that says so is returned.
    """
    from specbatch.config import load_config
    from specbatch.corpus import open_corpus
    from specbatch.planning import deployment
    from specbatch.planning.pipeline import times
    from specbatch.planning.rates import Known, rates
    from specbatch.planning.work import work_of

    if not run.corpus:
        return "the run is not prepared yet"
    if run.dir.recording.exists():
        return "its draft is trained on recorded steps, without engines"
    try:
        config = load_config(run.dir.config)
        work = work_of(config, open_corpus(run.dir))
        found = rates(Known(), work, config)
        took = times(work, found, deployment(config, work.steps))
    except (KeyError, TypeError):
        return f"{run.dir.corpus} was written by another version of specbatch"
    except (UserError, RunError, OSError) as error:
        # The target or the data may be on another machine.
        return str(error).splitlines()[0]
    return Planned(
        steps=work.steps,
        tokens=work.tokens,
        seconds=took.total_s,
        trainer_tokens_per_s=took.trainer_tokens_per_s,
        engine_tokens_per_s=took.engine_tokens_per_s,
        source=found.rank.source,
    )
