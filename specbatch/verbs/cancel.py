"""``specbatch cancel``."""

from __future__ import annotations

import argparse

from specbatch.verbs.options import run_dir_of, run_verb


def cancel(arguments: list[str]) -> int:
    """End a run after its current step, with a snapshot; it does not start again until you resume it."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--now", action="store_true", help="End it at once; steps after the last snapshot are lost."
        )

    options = run_verb(cancel, arguments, add)
    from specbatch.run.cancel import cancel as end

    print(f"{options.run}: {end(run_dir_of(options.run), at_once=options.now)}")
    return 0
