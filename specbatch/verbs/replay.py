"""``specbatch replay``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from specbatch.errors import UserError
from specbatch.verbs.options import run_dir_of, run_verb_known


def replay(arguments: list[str]) -> int:
    """Train recorded steps again without engines and compare the result, or train a new draft on them."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--from",
            dest="start",
            type=int,
            metavar="STEP",
            help="Step of the snapshot to begin with; 0: the first weights.",
        )
        parser.add_argument(
            "--steps", type=int, metavar="N", help="Number of steps; all recorded ones that follow if not given."
        )
        parser.add_argument(
            "--ranks", type=int, metavar="N", help="Trainer processes; as many as were recorded if not given."
        )
        parser.add_argument(
            "--source", choices=["recording"],
            help="Train a new draft on all recorded steps, or continue, in --run.dir, with any --SECTION.FIELD VALUE.",
        )  # fmt: skip
        parser.add_argument("--json", action="store_true", help="Print the result of each step as JSON.")

    from specbatch.config.load import config_options

    options, rest = run_verb_known(replay, arguments, add, {"run.dir": config_options()["run.dir"]})
    run_dir = run_dir_of(options.run)
    if options.source:
        return _train(options, rest)
    if rest:
        raise UserError(f"{rest[0]}: is not an option of `specbatch replay RUN` without --source recording")
    from specbatch.replay import replay as again

    verdicts = again(run_dir, options.start, options.steps, options.ranks)
    print(json.dumps(verdicts, indent=2) if options.json else "\n".join(map(_line, verdicts)))
    return 0 if all(verdict["same"] for verdict in verdicts) else 1


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from specbatch.config.load import config_options
    from specbatch.config.options import command_line
    from specbatch.run.local import train_on_recording
    from specbatch.rundir import RunDir

    out = dict(command_line(rest, config_options())).get("run.dir")
    if not out:
        raise UserError("--run.dir: is missing: give a directory for the new draft")
    return train_on_recording(run_dir_of(options.run), RunDir(Path(out).absolute()), rest)


def _line(verdict: dict[str, Any]) -> str:
    begin = f"step {verdict['step']}: loss {verdict['loss']!r}"
    if verdict["same"]:
        return f"{begin}, the same"
    packs = f", packs {', '.join(verdict['packs'])}" if verdict["packs"] else ""
    apart = "" if verdict["apart"] is None else f": {verdict['apart']:.2e} apart ({verdict['relative']:.1e})"
    return f"{begin}, recorded {verdict['recorded']!r}{apart}; different: {', '.join(verdict['different'])}{packs}"
