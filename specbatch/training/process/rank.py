"""One trainer rank: ``python -m specbatch.training.process.rank RUN_DIR ATTEMPT STARTS``, started by torch's agent.

Rank, number of ranks and their rendezvous come from the agent, in torch's own environment variables. Standard
output and error go to the rank's log. Exit codes: 0 trained or stopped with a snapshot, `EXIT_USER`, `EXIT_FINAL` and
`EXIT_ATTEMPT` for what a restart can't cure, 1 for all else.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from specbatch.config import load_config
from specbatch.errors import AttemptError, UserError
from specbatch.parent_death import die_with_parent
from specbatch.process_log import keep_short, open_log
from specbatch.rundir import RunDir
from specbatch.training import EXIT_ATTEMPT, EXIT_FINAL, EXIT_USER
from specbatch.training.process.exit import end_with
from specbatch.training.process.signals import ask_to_stop, watch

log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Never returns."""
    run_dir, attempt, starts = RunDir(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    rank = int(os.environ["RANK"])
    open_log(run_dir.component_log(attempt, "training", rank), f"training-{rank}")
    die_with_parent()
    _hear_signals(run_dir, attempt, rank)
    end_with(lambda: _work(run_dir, attempt, starts))


def _work(run_dir: RunDir, attempt: int, starts: int) -> int:
    from specbatch.training.assemble import train
    from specbatch.training.trainer import NotFiniteError

    log_path = run_dir.component_log(attempt, "training", int(os.environ["RANK"]))
    keep_short(load_config(run_dir.config).run.log_limit, log_path)
    try:
        train(run_dir, attempt, starts)
    except UserError as error:
        log.exception("ended: the user can mend this")
        print(error, file=sys.stderr)
        return EXIT_USER
    except (AttemptError, NotFiniteError) as error:
        log.exception("ended: a restart would not help")
        print(error, file=sys.stderr)
        return EXIT_ATTEMPT if isinstance(error, AttemptError) else EXIT_FINAL
    return 0


def _hear_signals(run_dir: RunDir, attempt: int, rank: int) -> None:
    """Handle signals: from the agent, one ends this rank, since another rank died; from anyone else, it asks the whole
    attempt to stop."""
    agent = os.getppid()

    def tell(number: signal.Signals, sender: int) -> None:
        log.info("signal=%s sender=%d", number.name, sender)
        if sender == agent:
            os._exit(1)
        ask_to_stop(run_dir.rendezvous(attempt), attempt, f"training rank {rank} got {number.name}")

    watch(tell)


if __name__ == "__main__":
    main()
