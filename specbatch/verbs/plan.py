"""``specbatch plan``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from specbatch.errors import UserError
from specbatch.verbs.options import config_verb, in_file, read_config

RATES = {
    "--engine-tokens-per-s": "Measured speed of one engine, if you know it.",
    "--trainer-tokens-per-s": "Measured speed of all ranks together, if you know it.",
    "--peak-tflops": "Peak of a GPU in TFLOP/s, of which a share is assumed where no speed is known; if not given, "
    "that of inference.gpu and training.gpu, of the profile, or of an H100.",
}


def plan(arguments: list[str]) -> int:
    """Estimate what a run will take before it starts: steps, bytes, operations, balance, hours."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--like",
            type=Path,
            metavar="RUN",
            help="A run, or a file of rates of `specbatch doctor`, that shows how fast engines and ranks are.",
        )
        for name, text in RATES.items():
            parser.add_argument(name, type=float, metavar="N", help=text)
        parser.add_argument("--json", action="store_true", help="Print all numbers as JSON.")

    options, rest = config_verb(plan, arguments, add)
    config = read_config(options, rest)
    if config is None:
        return 0
    from specbatch.planning import Known, budget
    from specbatch.planning.text import lines
    from specbatch.slurm.balance import balance_lines

    given = {name: getattr(options, name[2:].replace("-", "_")) for name in RATES}
    for name, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name}: {value:g} is given; it must be a number above 0")
    engine, trainer, peak = given.values()
    if config.run.goal == "answers" or config.data.regenerate.answers:
        from specbatch.planning.answers import answers_budget

        with in_file(options.config):
            asked = answers_budget(config, options.like, engine)
        print(json.dumps(asked.as_json(), indent=2) if options.json else "\n".join(asked.lines()))
        if config.run.goal == "draft" and not options.json:
            print("the training that follows is planned once there are answers: name them as data.train")
        return 0
    from specbatch.target.without_torch import without_torch

    without_torch(config)
    known = Known(options.like, engine, trainer, peak)
    with in_file(options.config):
        found = budget(config, known)
    for warning in found.warnings:
        print(f"specbatch: warning: {warning}", file=sys.stderr)
    shown = [] if options.json else lines(found)
    if shown and found.layout.nodes and shutil.which("scontrol"):
        shown += [f"{'':15}{line}" for line in balance_lines(config)]
    print("\n".join(shown) if shown else json.dumps(found.as_json(), indent=2))
    return 0
