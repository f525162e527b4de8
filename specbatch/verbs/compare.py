"""``specbatch compare``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from specbatch.verbs.options import plain_verb, run_dir_of


def compare(arguments: list[str]) -> int:
    """Measure how much two runs differ, and whether that is more than noise."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("run", type=Path, metavar="RUN", help="A run directory.")
        parser.add_argument("other", type=Path, metavar="RUN", help="Another run directory.")
        parser.add_argument(
            "--noise", type=Path, nargs=2, metavar="RUN",
            help="Two undisturbed runs; the difference between them counts as noise.",
        )  # fmt: skip
        parser.add_argument("--json", action="store_true", help="Print the result as JSON.")

    options = plain_verb(compare, arguments, add)
    from specbatch.compare import compare as measure
    from specbatch.compare import report

    noise = None if options.noise is None else (run_dir_of(options.noise[0]), run_dir_of(options.noise[1]))
    found = measure(run_dir_of(options.run), run_dir_of(options.other), noise)
    if options.json:
        verdict = {"equal": found.equal, "is_noise": found.is_noise, "first_step": found.first_step}
        print(json.dumps({**asdict(found), **verdict}, indent=2))
    else:
        print("\n".join(report(found)))
    return 0 if found.is_noise else 1
