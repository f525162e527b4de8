"""Reports the run to TensorBoard and Weights & Biases through torchtitan's own loggers, each in its own thread.

A tracker reads ``metrics.jsonl``, which has each step once whatever happened before. A killed attempt loses what its
trackers had in their buffers, so a new attempt first sends what its tracker lacks:

- TensorBoard's files are rewritten, from the first step.
- Weights & Biases continues the same run (its id is kept in ``trackers/wandb.json``), after the last step of the
  attempts that ended it properly. The offline folder of a killed attempt is removed, and its steps are sent again.
  Steps that the tracker has and that are trained once more are not sent twice: they are the same.

A tracker that fails is left out from then on, with one warning. Only `Trackers.close` waits for trackers, for at most
`CLOSE_S`.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import BaseLogger, TensorBoardLogger, WandBLogger

from specbatch.metrics_lines import MetricsTail
from specbatch.rundir import RunDir, read_json, write_json
from specbatch.training.observers.tracked import OFFLINE, scalars, sync_command

log = logging.getLogger(__name__)

CLOSE_S = 20.0
"""Seconds that the end of training waits for trackers."""
READ_EVERY_S = 1.0
"""Seconds between two looks for new steps."""


class Tracker(Protocol):
    """A logger of torchtitan that knows which steps it has."""

    told: int
    """Steps up to this one are not sent again."""

    def log(self, metrics: dict[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


class WholeTensorBoard(TensorBoardLogger):
    """Writes event files that begin with the first step and replace earlier ones."""

    told = 0

    def __init__(self, folder: Path) -> None:
        self.tag = None
        earlier = [*folder.glob("events.out.tfevents.*")]
        # Makes an open TensorBoard discard what it has read.
        self.writer = SummaryWriter(str(folder), max_queue=1000, purge_step=0)
        for file in earlier:
            file.unlink()


class ResumedWandB(WandBLogger):
    """Reports all attempts to one run of Weights & Biases; offline, unless the user's WANDB_MODE says otherwise.

    Args:
        folder: ``trackers`` of the run directory.
        name: name of the run if WANDB_RUN_NAME is not set.
        config: the run's configuration.
    """

    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        self._kept = folder / "wandb.json"
        self._known = read_json(self._kept) or {"id": secrets.token_hex(4), "told": 0, "whole": []}
        if not self._kept.exists():
            write_json(self._kept, self._known)
        for path in (folder / "wandb").glob(OFFLINE):
            if path.name not in self._known["whole"]:
                shutil.rmtree(path)
        given = {
            "WANDB_MODE": "offline",
            "WANDB_PROJECT": "specbatch",
            "WANDB_RUN_NAME": name,
            "WANDB_RUN_ID": self._known["id"],
            "WANDB_RESUME": "allow",
            "WANDB_SILENT": "true",
            # The address of a remote may contain a password.
            "WANDB_DISABLE_GIT": "true",
            "WANDB_DISABLE_CODE": "true",
        }
        for variable, value in given.items():
            os.environ.setdefault(variable, value)
        # Otherwise it replaces this process's output streams by its own.
        os.environ["WANDB_CONSOLE"] = "off"
        super().__init__(str(folder), config)
        # The server knows the last step of a run that continues online.
        self.told = max(self._known["told"], self.wandb.run.starting_step - 1)
        self._folder = Path(self.wandb.run.dir).parent.name

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.wandb.log(metrics, step=step, commit=True)
        self._known["told"] = step

    def close(self) -> None:
        super().close()
        self._known["whole"].append(self._folder)
        write_json(self._kept, self._known)


class Trackers(BaseLogger):
    """torchtitan's logger for a rank that reports steps: it wakes the threads of all trackers.

    Args:
        names: names of the trackers.
        name: name of the run, for people.
        config: configuration that is shown next to the curves.
        tell: is called with a tracker that fails and why.
    """

    def __init__(
        self,
        names: Sequence[str],
        run_dir: RunDir,
        *,
        name: str,
        config: dict[str, Any],
        tell: Callable[[str, str], None],
    ) -> None:
        folder = run_dir.trackers
        opens: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: WholeTensorBoard(folder / "tensorboard"),
            "wandb": lambda: ResumedWandB(folder, name, config),
        }
        self._run_dir = run_dir
        self._threads = [_Thread(known, opens[known], run_dir.metrics, tell) for known in dict.fromkeys(names)]

    def start(self) -> None:
        """Start reporting, once ``metrics.jsonl`` ends with the step that training continues from."""
        self._run_dir.trackers.mkdir(exist_ok=True)
        for thread in self._threads:
            thread.start()

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Look at ``metrics.jsonl`` again: a step was written."""
        for thread in self._threads:
            thread.wake.set()

    def close(self) -> None:
        """Send the rest, for at most `CLOSE_S`; a second call does nothing."""
        threads, self._threads = self._threads, []
        until = time.monotonic() + CLOSE_S
        for thread in threads:
            thread.ended.set()
            thread.wake.set()
        for thread in threads:
            thread.finish(until - time.monotonic())
        if threads and (command := sync_command(self._run_dir)):
            log.info("Weights & Biases kept the run offline; send it with: %s", command)


class _Thread(threading.Thread):
    def __init__(
        self, tracker: str, open_tracker: Callable[[], Tracker], metrics: Path, tell: Callable[[str, str], None]
    ) -> None:
        super().__init__(name=tracker, daemon=True)
        self.wake, self.ended = threading.Event(), threading.Event()
        self._open, self._metrics, self._tell = open_tracker, metrics, tell

    def run(self) -> None:
        try:
            self._track(self._open())
        except BaseException as error:  # any kind: third-party packages and their services
            self._fail(f"{type(error).__name__}: {' '.join(str(error).split())}")

    def finish(self, within_s: float) -> None:
        """Wait for the thread to end, and give the tracker up if it does not in time."""
        if self.ident is not None:
            self.join(max(0.0, within_s))
            if self.is_alive():
                self._fail(f"it did not end within {CLOSE_S:.0f} s")

    def _track(self, tracker: Tracker) -> None:
        metrics = MetricsTail(self._metrics)
        while True:
            ended = self.ended.is_set()
            self.wake.clear()
            for line in metrics.read():
                if line.step > tracker.told:
                    tracker.log(scalars(line), line.step)
            if ended:
                break
            self.wake.wait()
            self.ended.wait(READ_EVERY_S)
        tracker.close()

    def _fail(self, why: str) -> None:
        log.warning("TRACKER FAILED, training continues without it tracker=%s why=%s", self.name, why)
        self._tell(f"tracker {self.name}", why)
