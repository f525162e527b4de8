"""One rank that trains recorded steps: ``python -m specbatch.training.replay_rank ORDER``, started by torch's launcher.

Output goes to the rank's log in the order's folder. Exit codes are those of `specbatch.training.rank`. Who sends it a
signal asks all ranks to stop after the present step, with a snapshot, if there is a way to ask.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import msgspec

from specbatch.component_log import open_log
from specbatch.errors import RunError, UserError
from specbatch.training import EXIT_FINAL, EXIT_USER
from specbatch.training.ending import end_with
from specbatch.training.signals import die_with_parent, watch

log = logging.getLogger(__name__)


class Order(msgspec.Struct, frozen=True):
    """What all ranks are to do."""

    run: str
    """The run that was recorded."""
    logs: str
    first: int
    """The first recorded step to be trained."""
    count: int
    """How many from there on."""
    out: str = ""
    """Run directory of a new draft that is trained on them; empty: they are repeated from the snapshot before them."""
    verdicts: str = ""
    """File that says what came out of each repeated step."""
    together: int = 1
    """Ranks that train a repeated pack together."""
    last_step: int = 0
    """Of the new draft's training."""
    attempt: int = 0
    """Of the new draft's run."""
    stop: str = ""
    """File that is there once the new draft's training shall stop; empty: there is no way to ask."""


def log_path(logs: Path, rank: int) -> Path:
    """Where a rank writes."""
    return logs / f"training-{rank}.log"


def main() -> NoReturn:
    """Never returns, as `specbatch.training.rank.main`."""
    order = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Order)
    rank = int(os.environ["RANK"])
    open_log(log_path(Path(order.logs), rank), f"training-{rank}")
    die_with_parent()
    if order.stop:
        _hear_signals(Path(order.stop))
    end_with(lambda: _work(order))


def _work(order: Order) -> int:
    from specbatch.training.offline import repeat, train_anew

    try:
        train_anew(order) if order.out else repeat(order)
    except (UserError, RunError) as error:
        log.exception("can't go on")
        print(error, file=sys.stderr)
        return EXIT_USER if isinstance(error, UserError) else EXIT_FINAL
    return 0


def _hear_signals(stop: Path) -> None:
    """The launcher ends the other ranks when one died; anybody else means all of them, at the next step's boundary."""
    launcher = os.getppid()

    def tell(number: signal.Signals, sender: int) -> None:
        log.info("signal=%s sender=%d", number.name, sender)
        if sender == launcher:
            os._exit(1)
        stop.touch()

    watch(tell)


if __name__ == "__main__":
    main()
