"""``specbatch scale``."""

from __future__ import annotations

import re
from pathlib import Path

from specbatch.errors import UserError
from specbatch.verbs.options import run_dir_of, verb_parser


def scale(arguments: list[str]) -> int:
    """Add engines to a running run, on any nodes, or remove added ones."""
    parser = verb_parser(scale)
    parser.usage = "specbatch scale RUN --engines +N|-N [SBATCH OPTIONS ...]"
    parser.epilog = "Other options are passed to sbatch, as --partition or --time."
    parser.add_argument("run", type=Path, metavar="RUN", help="A run directory.")
    parser.add_argument("--engines", metavar="+N|-N", help="Number of engines to add or to remove.")
    options, rest = parser.parse_known_args(arguments)
    change = re.fullmatch(r"([+-])([1-9]\d{0,3})", options.engines or "")
    if change is None:
        raise UserError(f"--engines: {options.engines}: write +2 to add two, or -1 to remove one")
    run_dir = run_dir_of(options.run)
    from specbatch.slurm.scale import add, remove

    if change[1] == "+":
        print(f"{options.run}: {add(run_dir, int(change[2]), rest)}")
        return 0
    if rest:
        raise UserError(f"{rest[0]}: removing engines takes no further options")
    print(f"{options.run}: {remove(run_dir, int(change[2]))}")
    return 0
