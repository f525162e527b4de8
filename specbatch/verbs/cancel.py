"""``specbatch cancel``."""

from __future__ import annotations

import argparse

from specbatch.verbs.options import run_dir_of, run_verb


def cancel(arguments: list[str]) -> int:
    """End a run after the present step, with a snapshot; it stays ended until it is resumed."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--now", action="store_true", help="At once: what follows the last snapshot is lost.")

    options = run_verb(cancel, arguments, add)
    from specbatch.launch.cancel import cancel as end

    print(f"{options.run}: {end(run_dir_of(options.run), at_once=options.now)}")
    return 0
