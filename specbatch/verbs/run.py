"""``specbatch run`` and ``specbatch resume``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from specbatch.errors import UserError
from specbatch.verbs.options import config_verb, in_file, read_config, run_dir_of, run_verb_known

if TYPE_CHECKING:
    from specbatch.rundir import RunDir


def run(arguments: list[str]) -> int:
    """Run all components on this machine, from conversations to a measured draft."""
    options, rest = config_verb(run, arguments)
    config = read_config(options, rest)
    if config is None:
        return 0
    from specbatch.launch import local

    with in_file(options.config):
        return local.run(config)


def resume(arguments: list[str]) -> int:
    """Go on with a run where its newest snapshot stands, also with settings that make no other training of it."""
    from specbatch.config.change import may_change
    from specbatch.config.load import config_options

    def add(parser: argparse.ArgumentParser) -> None:
        where = "Go on as a Slurm job, or on this machine; as it was started if not given."
        parser.add_argument("--on", choices=["slurm", "here"], help=where)

    fields = {name: option for name, option in config_options().items() if may_change(name)}
    options, rest = run_verb_known(resume, arguments, add, fields)
    from specbatch.launch import local
    from specbatch.launch.slurm import submit as submitting

    run_dir = run_dir_of(options.run)
    if run_dir.recording.exists():
        return _resume_offline(run_dir, options.on, rest)
    if options.on == "here" or not (options.on or submitting.was_submitted(run_dir)):
        return local.resume(options.run, rest)
    from specbatch.config import load_config
    from specbatch.verbs.submit import print_next, warn

    with in_file(run_dir.config):
        job = submitting.resume(run_dir, rest, warn)
    if job is None:
        print(f"{options.run}: this run is complete: its draft is in {run_dir.export}")
    else:
        print_next(job, load_config(run_dir.config))
    return 0


def _resume_offline(run_dir: RunDir, where: str | None, overrides: list[str]) -> int:
    from specbatch.launch import offline

    if where == "slurm":
        raise UserError(f"--on: {run_dir.root} is trained on recorded steps, which is done here, in a job of one's own")
    return offline.resume(run_dir, overrides)
