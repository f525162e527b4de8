"""``specbatch scale``."""

from __future__ import annotations

import re
from pathlib import Path

from specbatch.errors import UserError
from specbatch.verbs.options import run_dir_of, verb_parser


def scale(arguments: list[str]) -> int:
    """Add engines to a running run, on any nodes, or take added ones away."""
    parser = verb_parser(scale)
    parser.usage = "specbatch scale RUN --engines +N|-N [SBATCH OPTIONS ...]"
    parser.epilog = "What is no option here is sbatch's, as --partition or --time."
    parser.add_argument("run", type=Path, metavar="RUN", help="A run directory.")
    parser.add_argument("--engines", metavar="+N|-N", help="How many more, or how many fewer.")
    options, rest = parser.parse_known_args(arguments)
    change = re.fullmatch(r"([+-])([1-9]\d{0,3})", options.engines or "")
    if change is None:
        raise UserError(f"--engines: {options.engines}: say how many more, as +2, or how many fewer, as -1")
    run_dir = run_dir_of(options.run)
    from specbatch.launch.slurm.scale import add, remove

    if change[1] == "+":
        print(f"{options.run}: {add(run_dir, int(change[2]), rest)}")
        return 0
    if rest:
        raise UserError(f"{rest[0]}: engines are taken away without further options")
    print(f"{options.run}: {remove(run_dir, int(change[2]))}")
    return 0
