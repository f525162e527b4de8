"""``specbatch evaluate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from specbatch.verbs.options import log_to_stderr, run_dir_of, run_verb_known


def evaluate(arguments: list[str]) -> int:
    """Measure a run's draft by real speculative decoding of held-out prompts."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--draft", type=Path, metavar="DIR", help="The draft; the run's export/ if not given.")
        parser.add_argument("--json", action="store_true", help="Print evaluation.json.")

    from specbatch.config.options import options_of
    from specbatch.config.sections import Evaluate

    fields = options_of(Evaluate)
    options, rest = run_verb_known(evaluate, arguments, add, fields)
    import dataclasses

    from specbatch.config import load_config
    from specbatch.config.options import COMMAND_LINE, command_line, values_of

    run_dir = run_dir_of(options.run)
    given = dict(command_line(rest, fields))
    values = values_of(given, fields, lambda name: COMMAND_LINE)
    settings = dataclasses.replace(load_config(run_dir.config).evaluate, **{name: values[name] for name in given})
    log_to_stderr()
    from specbatch.evaluate import evaluate as measure
    from specbatch.evaluate import report, summary_line

    evaluation = measure(run_dir, draft=options.draft, settings=settings)
    if options.json:
        print(json.dumps(evaluation, indent=2))
        return 0
    print("\n".join(report(evaluation)))
    print(summary_line(evaluation, options.draft or run_dir.export))
    return 0
