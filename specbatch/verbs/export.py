"""``specbatch export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from specbatch.verbs.options import log_to_stderr, run_dir_of, run_verb


def export(arguments: list[str]) -> int:
    """Write a snapshot's draft as a Hugging Face directory that SGLang and vLLM load."""

    def add(parser: argparse.ArgumentParser) -> None:
        which = parser.add_mutually_exclusive_group()
        which.add_argument(
            "--step", type=int, metavar="N", help="Step of the snapshot; the newest undamaged one if not given."
        )
        which.add_argument(
            "--best", action="store_true", help="Take the snapshot that evaluations during training found best."
        )
        parser.add_argument(
            "--out", type=Path, metavar="DIR", help="Directory to write; the run's export/ if not given."
        )

    options = run_verb(export, arguments, add)
    log_to_stderr()
    from specbatch.export import export as write

    print(write(run_dir_of(options.run), options.step, options.out, best=options.best))
    return 0
