"""What a run needs before its first attempt: corpus and plan, checked against the store, and what it is made from."""

from __future__ import annotations

from collections.abc import Callable

from specbatch.config import Config
from specbatch.rundir import RunDir, write_json


def prepare(
    run_dir: RunDir, config: Config, progress: Callable[[str, int, int], None], say: Callable[[str], None]
) -> None:
    """Write ``corpus.json`` and, once, ``provenance.json``.

    Args:
        progress: called with what is done, how much of it, and of how much.
        say: gets the summary and warnings.

    Raises:
        UserError: the data or the settings can't work.
    """
    from specbatch import corpus
    from specbatch.checks import check_plan, check_recording
    from specbatch.launch.provenance import provenance
    from specbatch.target import capture_contract, fingerprint, read_target

    summary = corpus.prepare(config, progress)
    corpus.attach(run_dir, summary)
    say(summary.text())
    prepared = corpus.open_corpus(run_dir)
    plan = corpus.make_plan(config, prepared)
    target = read_target(config.target.path)
    contract = capture_contract(config, target)
    for warning in check_plan(config, plan, prepared, contract):
        say(f"warning: {warning}")
    if recording := check_recording(config, plan, contract):
        say(recording)
    if not run_dir.provenance.exists():
        made_from = provenance(config.target.path, fingerprint(target), prepared.fingerprint, plan.fingerprint)
        write_json(run_dir.provenance, made_from)
