"""One trainer rank: ``python -m specbatch.training.rank RUN_DIR ATTEMPT``, started by torch's elastic agent.

Rank, number of ranks and their meeting point come from the agent, in torch's own environment variables. Standard
output and error go to the rank's log. Exit codes: 0 trained or stopped with a snapshot, `EXIT_USER` and
`EXIT_FINAL` for what a restart can't cure, 1 for all else.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from pathlib import Path

from specbatch.errors import UserError
from specbatch.rundir import RunDir
from specbatch.training import EXIT_FINAL, EXIT_USER
from specbatch.training.signals import ask_to_stop, die_with_parent, watch

log = logging.getLogger(__name__)


def main() -> None:
    """Never returns: threads of libraries that are ended by the interpreter abort the process now and then."""
    run_dir, attempt = RunDir(Path(sys.argv[1])), int(sys.argv[2])
    rank = int(os.environ["RANK"])
    _open_log(run_dir.component_log(attempt, "training", rank), rank)
    die_with_parent()
    _hear_signals(run_dir, attempt, rank)
    code = 1
    try:
        code = _work(run_dir, attempt)
    except Exception:
        log.exception("rank ended")
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _work(run_dir: RunDir, attempt: int) -> int:
    from specbatch.dispatch.client import DispatcherGone
    from specbatch.training.assemble import train
    from specbatch.training.trainer import NotFiniteError

    try:
        train(run_dir, attempt)
    except UserError as error:
        log.exception("the user can mend this")
        print(error, file=sys.stderr)
        return EXIT_USER
    except (DispatcherGone, NotFiniteError) as error:
        log.exception("starting again would not help")
        print(error, file=sys.stderr)
        return EXIT_FINAL
    return 0


def _open_log(path: Path, rank: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(fd, stream.fileno())
    os.close(fd)
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s training-{rank} %(levelname)s %(message)s", stream=sys.stderr
    )
    # For the head, when nothing moves: all stacks into the log.
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def _hear_signals(run_dir: RunDir, attempt: int, rank: int) -> None:
    """The agent ends the other ranks when one died; anybody else who says stop means the whole attempt."""
    agent = os.getppid()

    def tell(number: signal.Signals, sender: int) -> None:
        log.info("signal=%s sender=%d", number.name, sender)
        if sender == agent:
            os._exit(1)
        ask_to_stop(run_dir.rendezvous(attempt), attempt, f"training rank {rank} got {number.name}")

    watch(tell)


if __name__ == "__main__":
    main()
