"""``specbatch doctor``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from specbatch.errors import UserError
from specbatch.verbs.options import config_verb, in_file, read_config

if TYPE_CHECKING:
    from specbatch.config import Config


def doctor(arguments: list[str]) -> int:
    """Check whether a run will work, here or on its nodes, and how fast."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--submit",
            action="store_true",
            help="Check the run's own nodes, in a Slurm job of a few minutes, and wait for it; else this machine.",
        )
        parser.add_argument("--json", action="store_true", help="Print what was found as JSON.")

    options, rest = config_verb(doctor, arguments, add)
    config = read_config(options, rest)
    if config is None:
        return 0
    from specbatch.doctor import outcome
    from specbatch.doctor.trial import make_trial

    with in_file(options.config):
        if config.run.goal == "answers":
            raise UserError(
                "run.goal: answers: the doctor checks runs that train a draft; --run.goal draft checks this "
                "configuration's engines, and what a training would need"
            )
        root = _directory(config)
        checked = _checked(config, submit=options.submit)
        _tell("making up packs for a trial")
        trial = make_trial(checked, root)
        if options.submit:
            from specbatch.doctor.job import examine_in_job

            examine_in_job(trial, root, _tell)
        else:
            from specbatch.doctor.here import examine_here

            _tell("starting the components, each on its own, on this machine")
            examine_here(trial, root)
    found = outcome.collect(trial, root, slurm=options.submit)
    rates = outcome.write_rates(found, root)
    if options.json:
        print(json.dumps(outcome.as_json(found, root), indent=2))
    else:
        outcome.print_table(found)
        _print_end(outcome.works(found), root, rates)
    if options.submit and outcome.works(found):
        outcome.remember(config)
    return 0 if outcome.works(found) else 1


def _checked(config: Config, *, submit: bool) -> Config:
    """The configuration as a run would have it, with the checks of `submit` or `run` but those of the data."""
    if not submit:
        return config
    from specbatch.slurm.submit import check_for_job

    return check_for_job(config, _warn, _tell)


def _directory(config: Config) -> Path:
    """The doctor's own directory beside the run's, empty.

    Raises:
        UserError: something else is there.
    """
    from specbatch.rundir import RunDir

    run = Path(config.run.dir).absolute()
    root = run.with_name(f"{run.name}-doctor")
    if root.exists() and not RunDir(root).mark.exists():
        raise UserError(f"{root}: the doctor would write there, and did not make it; move it away")
    shutil.rmtree(root, ignore_errors=True)
    return root


def _print_end(works: bool, root: Path, rates: Path | None) -> None:
    print("nothing was found that would break the run" if works else "the run would break: see the lines marked failed")
    print(f"logs: {root}")
    if rates:
        print(f"rates: specbatch plan --config FILE --like {rates}")


def _tell(text: str) -> None:
    print(f"specbatch: {text}", file=sys.stderr, flush=True)


def _warn(text: str) -> None:
    _tell(f"warning: {text}")
