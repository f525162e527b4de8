"""``specbatch logs``."""

from __future__ import annotations

import argparse
import sys

from specbatch.verbs.options import run_dir_of, run_verb

COLOURS = (36, 33, 35, 32, 34, 31)


def logs(arguments: list[str]) -> int:
    """Print what the components of a run logged in the newest attempt, ordered by time."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "component", nargs="?", default="", metavar="COMPONENT[-TASK]",
            help="Print this component only, as `training` or `inference-0`.",
        )  # fmt: skip
        parser.add_argument(
            "-f", "--follow", action="store_true", help="Print new lines as they come, until the run ends."
        )

    options = run_verb(logs, arguments, add)
    from specbatch.run.logs import follow_logs, print_logs

    (follow_logs if options.follow else print_logs)(run_dir_of(options.run), options.component, _Printer())
    return 0


class _Printer:
    """Prints each line after the name of its log, in colour on a terminal."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._coloured = sys.stdout.isatty()

    def __call__(self, name: str, line: str) -> None:
        if name not in self._names:
            colour = COLOURS[len(self._names) % len(COLOURS)]
            self._names[name] = f"\x1b[{colour}m{name:12}\x1b[0m" if self._coloured else f"{name:12}"
        print(f"{self._names[name]} | {line}", flush=True)
