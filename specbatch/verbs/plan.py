"""``specbatch plan``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from specbatch.verbs.options import config_verb, in_file, read_config


def plan(arguments: list[str]) -> int:
    """Say what a run will take before it is started: steps, bytes, operations, balance, hours."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--like", type=Path, metavar="RUN", help="A run that shows how fast engines and ranks are.")
        parser.add_argument(
            "--engine-tokens-per-s", type=_positive, metavar="N", help="What one engine computes, if it is known."
        )
        parser.add_argument(
            "--trainer-tokens-per-s", type=_positive, metavar="N", help="What all ranks train, if it is known."
        )
        parser.add_argument(
            "--peak-tflops",
            type=_positive,
            default=989.0,
            metavar="N",
            help="A GPU's peak, of which a share is assumed where nothing else is known. (default: 989, an H100)",
        )
        parser.add_argument("--json", action="store_true", help="Print all numbers as JSON.")

    options, rest = config_verb(plan, arguments, add)
    config = read_config(options, rest)
    if config is None:
        return 0
    from specbatch.budget import Known, budget
    from specbatch.budget.text import lines

    known = Known(options.like, options.engine_tokens_per_s, options.trainer_tokens_per_s, options.peak_tflops)
    with in_file(options.config):
        found = budget(config, known)
    for warning in found.warnings:
        print(f"specbatch: warning: {warning}", file=sys.stderr)
    print(json.dumps(found.as_json(), indent=2) if options.json else "\n".join(lines(found)))
    return 0


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value
