"""Signs of life: every component reports to the dispatcher, over the network, that its node is alive.

Slurm takes minutes to notice that a node is gone, and a node that lost its network does not notice.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from specbatch.rundir import RunDir

INTERVAL_S = 3.0
SILENT_S = 30.0
"""Seconds of silence after which a component that has reported before counts as lost."""
_DEADLINE_S = 10.0


@contextlib.contextmanager
def heartbeat(run_dir: RunDir, attempt: int, component: str, task: int) -> Iterator[None]:
    """Report in a thread that this task is alive, as long as the block runs."""
    over = threading.Event()
    thread = threading.Thread(target=_beat, args=(run_dir, attempt, f"{component}-{task}", over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _beat(run_dir: RunDir, attempt: int, name: str, over: threading.Event) -> None:
    from specbatch.dispatch.client import Client
    from specbatch.dispatch.connection_file import wait_for
    from specbatch.errors import RunError

    while not over.wait(INTERVAL_S):
        # Working components notice and report themselves that the dispatcher is gone; here it may come back.
        with (
            contextlib.suppress(RunError),
            contextlib.closing(
                Client(wait_for(run_dir.rendezvous(attempt), attempt, 0.0), deadline_s=_DEADLINE_S)
            ) as client,
        ):
            while not over.is_set():
                client.alive(name)
                over.wait(INTERVAL_S)
