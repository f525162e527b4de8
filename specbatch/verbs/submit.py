"""``specbatch submit``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from specbatch.verbs.options import config_verb, in_file, read_config

if TYPE_CHECKING:
    from specbatch.config import Config


def submit(arguments: list[str]) -> int:
    """Check a run, and queue it as a Slurm job."""

    def add(parser: argparse.ArgumentParser) -> None:
        group = parser.add_mutually_exclusive_group()
        group.add_argument("--dry-run", action="store_true", help="Print the script and end; nothing is written.")
        group.add_argument(
            "--test-only",
            action="store_true",
            help="Check everything, ask Slurm, and end; nothing is written or queued.",
        )

    options, rest = config_verb(submit, arguments, add)
    config = read_config(options, rest)
    if config is None:
        return 0
    from specbatch.launch.slurm import submit as submitting

    with in_file(options.config):
        if options.dry_run:
            print(submitting.script_of(config, warn), end="")
        elif options.test_only:
            print(submitting.test(config, warn))
        else:
            print_next(submitting.submit(config, warn), config)
    return 0


def warn(text: str) -> None:
    """Show what is no reason to stop."""
    print(f"specbatch: warning: {text}", file=sys.stderr)


def print_next(job: int, config: Config) -> None:
    """The job, the run directory, and what one wants to do next."""
    from specbatch.launch.slurm.script import parts_of

    root = Path(config.run.dir).absolute()
    shown = shlex.quote(os.path.relpath(root) if root.is_relative_to(Path.cwd()) else str(root))
    nodes = ", ".join(f"{part.name} on {part.nodes} node{'s' * (part.nodes > 1)}" for part in parts_of(config))
    print(f"job {job}: {nodes}")
    print(f"run directory: {root}")
    for command, does in (
        (f"specbatch status {shown}", "how it stands"),
        (f"specbatch logs -f {shown}", "what its components say"),
        (f"specbatch cancel {shown}", "end it, with a snapshot"),
    ):
        print(f"  {command:40}  # {does}")
