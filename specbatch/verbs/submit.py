"""``specbatch submit``."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from specbatch import __version__
from specbatch.verbs.options import config_verb, in_file, keep_file, read_config

if TYPE_CHECKING:
    from specbatch.config import Config


def submit(arguments: list[str]) -> int:
    """Check a run and queue it as a Slurm job."""

    def add(parser: argparse.ArgumentParser) -> None:
        group = parser.add_mutually_exclusive_group()
        group.add_argument(
            "--dry-run", action="store_true", help="Print the batch script and end; nothing is written or queued."
        )
        group.add_argument(
            "--test-only",
            action="store_true",
            help="Check everything, ask Slurm, and end; nothing is written or queued.",
        )
        parser.add_argument(
            "--prepare",
            choices=("here", "job"),
            default="",
            metavar="here|job",
            help="Prepare the data before the run starts: on this host, or in a small job of their own that the run "
            "waits for. The first attempt does it if not given.",
        )

    options, rest = config_verb(submit, arguments, add)
    config = read_config(options, rest)
    if config is None:
        return 0
    from specbatch.doctor.outcome import passed
    from specbatch.slurm import submit as submitting

    with in_file(options.config):
        keep_file(options.config, config)
        if options.dry_run:
            print(submitting.script_of(config, warn), end="")
        elif options.test_only:
            print(submitting.test(config, warn, tell))
        else:
            job = submitting.submit(config, warn, tell, options.prepare)
            if not passed(config):
                tell(
                    f"no doctor has passed for {_profile(config)} and specbatch {__version__}: `specbatch doctor "
                    f"--config {options.config} --submit` tells in minutes whether this run works, and how fast"
                )
            print_next(job, config)
    return 0


def _profile(config: Config) -> str:
    return f"profile {config.slurm.profile}" if config.slurm.profile else "a job without profile"


def tell(text: str) -> None:
    """Print what is being done, or what was chosen."""
    print(f"specbatch: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning."""
    print(f"specbatch: warning: {text}", file=sys.stderr)


def cost(config: Config) -> str:
    """What one attempt is charged if it uses all its time, in words."""
    from specbatch.slurm.check_request import limit_s
    from specbatch.slurm.directives import requests
    from specbatch.slurm.durations import slurm_time

    nodes = sum(int(asked.get("nodes") or 1) for asked in requests(config).values())
    hours = nodes * limit_s(config) / 3600
    charged = f", charged as {hours * config.slurm.charge:.1f}" if config.slurm.charge != 1 else ""
    return f"{hours:.1f} node-hours, {nodes} nodes for {slurm_time(limit_s(config))}{charged}"


def print_next(job: int, config: Config) -> None:
    """Print the job, the run directory, and the commands that come next."""
    from specbatch.rundir import as_typed
    from specbatch.slurm.balance import balance_lines
    from specbatch.slurm.parts import parts_of

    root = Path(config.run.dir).absolute()
    shown = shlex.quote(as_typed(root))
    nodes = ", ".join(f"{part.name} on {part.nodes} node{'s' * (part.nodes > 1)}" for part in parts_of(config))
    print(f"job {job}: {nodes}")
    print(f"run directory: {root}")
    print(f"an attempt costs at most {cost(config)}")
    for line in balance_lines(config):
        print(line)
    kept = "the answers so far" if config.run.goal == "answers" else "a snapshot"
    for command, does in (
        (f"specbatch status {shown}", "show its state"),
        (f"specbatch logs -f {shown}", "follow its logs"),
        (f"specbatch cancel {shown}", f"end it, with {kept}"),
    ):
        print(f"  {command:40}  # {does}")
