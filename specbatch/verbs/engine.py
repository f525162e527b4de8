"""``specbatch engine``."""

from __future__ import annotations

from specbatch.verbs.options import run_dir_of, run_verb

CALLED_AWAY = 75
"""Exit code: the engine was stopped, but the run goes on, so its job may be submitted again."""


def engine(arguments: list[str]) -> int:
    """Run one more engine of a running run on this machine, until the run ends; in a job or by hand."""
    options = run_verb(engine, arguments)
    from specbatch.run.elastic_engine import join

    called_away, why = join(run_dir_of(options.run))
    print(f"{options.run}: the engine ended: {why}")
    return CALLED_AWAY if called_away else 0
