"""One rank that trains recorded steps: ``python -m specbatch.training.replay_rank ORDER``, started by torch's agent.

Output goes to the rank's log in the order's folder. Exit codes are those of `specbatch.training.process.rank`.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

import msgspec

from specbatch.errors import RunError, UserError
from specbatch.parent_death import die_with_parent
from specbatch.process_log import open_log
from specbatch.training import EXIT_FINAL, EXIT_USER
from specbatch.training.process.exit import end_with

log = logging.getLogger(__name__)


class Order(msgspec.Struct, frozen=True):
    """The work of all ranks."""

    run: str
    """The recorded run."""
    logs: str
    first: int
    """The first recorded step to train."""
    count: int
    """Number of steps to train."""
    verdicts: str
    """File for the result of each repeated step."""
    together: int
    """Number of ranks that train a repeated pack together."""


def log_path(logs: Path, rank: int) -> Path:
    """Return the log file of a rank."""
    return logs / f"training-{rank}.log"


def main() -> NoReturn:
    """Never returns, as `specbatch.training.process.rank.main`."""
    order = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Order)
    rank = int(os.environ["RANK"])
    open_log(log_path(Path(order.logs), rank), f"training-{rank}")
    die_with_parent()
    end_with(lambda: _work(order))


def _work(order: Order) -> int:
    from specbatch.training.repeat import repeat

    try:
        repeat(order)
    except (UserError, RunError) as error:
        log.exception("can't continue")
        print(error, file=sys.stderr)
        return EXIT_USER if isinstance(error, UserError) else EXIT_FINAL
    return 0


if __name__ == "__main__":
    main()
