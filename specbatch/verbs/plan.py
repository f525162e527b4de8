"""``specbatch plan``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from specbatch.errors import UserError
from specbatch.verbs.options import config_verb, in_file, read_config

RATES = {
    "--engine-tokens-per-s": "What one engine computes, if it is known.",
    "--trainer-tokens-per-s": "What all ranks train together, if it is known.",
    "--peak-tflops": "Of a GPU, of which a share is assumed where nothing else is known; an H100's 989 if not given.",
}


def plan(arguments: list[str]) -> int:
    """Say what a run will take before it is started: steps, bytes, operations, balance, hours."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--like", type=Path, metavar="RUN", help="A run that shows how fast engines and ranks are.")
        for name, text in RATES.items():
            parser.add_argument(name, type=float, metavar="N", help=text)
        parser.add_argument("--json", action="store_true", help="Print all numbers as JSON.")

    options, rest = config_verb(plan, arguments, add)
    config = read_config(options, rest)
    if config is None:
        return 0
    from specbatch.budget import Known, budget
    from specbatch.budget.rates import PEAK_TFLOPS
    from specbatch.budget.text import lines

    given = {name: getattr(options, name[2:].replace("-", "_")) for name in RATES}
    for name, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name}: {value:g} is given; it must be a number above 0")
    engine, trainer, peak = given.values()
    known = Known(options.like, engine, trainer, peak or PEAK_TFLOPS)
    with in_file(options.config):
        found = budget(config, known)
    for warning in found.warnings:
        print(f"specbatch: warning: {warning}", file=sys.stderr)
    print(json.dumps(found.as_json(), indent=2) if options.json else "\n".join(lines(found)))
    return 0
