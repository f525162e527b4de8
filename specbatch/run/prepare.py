"""Prepares a run before its first attempt: corpus and plan, checked against the store, and provenance."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from specbatch.config import Config
from specbatch.rundir import RunDir, read_json, write_json


def prepare_prompts(run_dir: RunDir, config: Config) -> None:
    """Write ``questions.json`` and, for a run that only answers prompts, ``provenance.json`` once.

    Raises:
        UserError: the data can't be read, or has changed since the run began.
    """
    from specbatch.regenerate.rows import count_rows
    from specbatch.run.provenance import provenance
    from specbatch.target import fingerprint, read_target

    count_rows(run_dir, config)
    if config.run.goal == "answers" and not run_dir.provenance.exists():
        data = ",".join(source["digest"] for source in read_json(run_dir.questions)["sources"])
        target = fingerprint(read_target(config.target.path))
        write_json(run_dir.provenance, provenance(config.target.path, target, data, {}))


def prepare(
    run_dir: RunDir, config: Config, progress: Callable[[str, int, int], None], say: Callable[[str], None]
) -> None:
    """Write ``corpus.json``, unless packs come from a recording, and ``provenance.json`` once.

    Args:
        progress: called with the name of the stage, how much is done, and of how much.
        say: called with the summary and warnings.

    Raises:
        UserError: the data or the settings can't work.
    """
    from specbatch import corpus
    from specbatch.checks import check_plan
    from specbatch.checks.run_dir import check_recording, check_snapshot
    from specbatch.drafts.base import algorithm_of
    from specbatch.recorded_plan import plan_of_run, recording_source
    from specbatch.run.provenance import provenance
    from specbatch.target import fingerprint, read_target

    source, target = recording_source(run_dir), read_target(config.target.path)
    algorithm = algorithm_of(config, target)
    if source is None:
        summary = corpus.prepare(config, progress)
        corpus.attach(run_dir, summary)
        say(summary.text())
        prepared = corpus.open_corpus(run_dir)
        planned = corpus.make_plan(config, prepared)
        check_snapshot(run_dir.snapshots, algorithm)
        for warning in check_plan(config, planned, prepared, algorithm):
            say(f"warning: {warning}")
        if recording := check_recording(config, planned, algorithm.contract):
            say(recording)
    if not run_dir.provenance.exists():
        prepared = corpus.open_corpus(run_dir)
        plan = plan_of_run(run_dir, config, prepared)
        made_from = provenance(config.target.path, fingerprint(target), prepared.fingerprint, plan.fingerprint)
        write_json(run_dir.provenance, made_from | ({"recording": msgspec.to_builtins(source)} if source else {}))
