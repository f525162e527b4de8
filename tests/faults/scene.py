"""A run that things happen to: started, gone on with, watched through its logs, and searched for what may be hit."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from specbatch.rundir import RunDir, read_json
from tests.faults.clock import Clock
from tests.faults.objects import Stranger
from tests.faults.processes import Processes
from tests.faults.tinyrun import write_run

POLL_S = 0.05
RECOVERY_S = 240.0
"""Seconds after which a fault without recovery counts as lost."""
DONE, STOPPED = 0, 75

Sign = tuple[str, str]
"""A component's log and a regular expression that it must match, in lines that are new."""


class NotRecovered(AssertionError):
    """A run did not go on, or ended as it should not."""


class Scene:
    """One run.

    Args:
        folder: gets the configuration, the run directory and what the command prints.
        clock: that the run's processes look at; their own where None.
    """

    def __init__(self, folder: Path, target: Path, steps: int, clock: Clock | None = None, prompts: int = 0) -> None:
        self.config = write_run(folder, target, steps, prompts)
        self.folder, self.clock, self.steps = folder, clock, steps
        self.run_dir = RunDir(folder / "run")
        self.processes = Processes(self.run_dir)
        self.command: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self._strangers: dict[int, Stranger] = {}

    def go_on(self) -> None:
        """Start the command: ``run`` at first, ``resume`` later."""
        first = not (self.run_dir.root / "config.yaml").exists()
        words = ["run", "--config", str(self.config)] if first else ["resume", str(self.run_dir.root)]
        state = self.folder / "state"
        with (self.folder / "output.txt").open("ab") as output:
            self.command = subprocess.Popen(
                [sys.executable, "-m", "specbatch", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                # What is done to these runs is nothing for the user's list of runs.
                env={**os.environ, **(self.clock.environment() if self.clock else {}), "XDG_STATE_HOME": str(state)},
                start_new_session=True,
            )
        self.starts += 1

    def ended(self) -> bool:
        """Whether the run is complete; a command that was stopped or killed is started again.

        Raises:
            NotRecovered: the command failed.
        """
        assert self.command is not None
        code = self.command.poll()
        if code is None:
            return False
        if code == DONE:
            return True
        if code not in (STOPPED, -signal.SIGKILL):
            raise NotRecovered(f"the command ended with code {code}:\n{self.tell()}")
        until = time.monotonic() + RECOVERY_S
        while self.processes.all():
            if time.monotonic() > until:
                raise NotRecovered(f"left over: {self.processes.all()}\n{self.tell()}")
            time.sleep(POLL_S)
        self.go_on()
        return False

    def stranger(self) -> Stranger:
        """At the store of this attempt.

        Raises:
            OSError: there is none.
        """
        attempt = self.processes.attempt()
        if attempt not in self._strangers:
            self._strangers[attempt] = Stranger(self.run_dir.rendezvous(attempt))
        return self._strangers[attempt]

    def kill(self) -> None:
        """End whatever is left."""
        for stranger in self._strangers.values():
            stranger.close()
        if self.command is not None and self.command.poll() is None:
            self.command.kill()
            self.command.wait()
        for process in self.processes.all():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def stage(self) -> str:
        """Return the stage of the run, as the head reports it."""
        status = read_json(self.run_dir.status) or {}
        return str(status.get("stage", "")) if status.get("attempt") == self.processes.attempt() else ""

    def lines(self, component: str) -> list[str]:
        """All whole lines of a component's log, over all attempts."""
        logs = [self.run_dir.component_log(attempt, component, 0) for attempt in self.run_dir.attempts()]
        text = "".join(log.read_text(errors="replace") for log in logs if log.exists())
        return text.split("\n")[:-1]

    def trained(self) -> list[int]:
        """Every step that was trained, in order, with those that were trained again."""
        found = (re.search(r" trained step=(\d+) ", line) for line in self.lines("training"))
        return [int(match[1]) for match in found if match]

    def await_step(self) -> bool:
        """Wait until a step more is trained; False if the run ended meanwhile."""
        return self.await_signs([("training", " trained step=")])

    def await_signs(
        self, signs: Sequence[Sign], after: dict[str, int] | None = None, meanwhile: Callable[[], None] | None = None
    ) -> bool:
        """Wait until each sign was seen, one after the other.

        Args:
            after: lines of each component's log that are old; what is there now where not given.
            meanwhile: called again and again.

        Returns:
            False if the run ended meanwhile.

        Raises:
            NotRecovered: if that takes too long.
        """
        after = after or self.marks()
        until = time.monotonic() + RECOVERY_S
        for component, pattern in signs:
            while not self._seen(component, pattern, after):
                if self.ended():
                    return False
                if meanwhile is not None:
                    meanwhile()
                if time.monotonic() > until:
                    raise NotRecovered(f"no {pattern!r} in the log of {component}:\n{self.tell()}")
                time.sleep(POLL_S)
        return True

    def marks(self) -> dict[str, int]:
        """Return the current lengths of the logs."""
        return {component: len(self.lines(component)) for component in ("training", "inference")}

    def finish(self) -> None:
        """Wait for the end.

        Raises:
            NotRecovered: it does not come, or something is left over.
        """
        until = time.monotonic() + RECOVERY_S
        done = len(self.trained())
        while not self.ended():
            if len(self.trained()) != done:
                done, until = len(self.trained()), time.monotonic() + RECOVERY_S
            if time.monotonic() > until:
                raise NotRecovered(f"the run does not end:\n{self.tell()}")
            time.sleep(POLL_S)
        if left := self.processes.all():
            raise NotRecovered(f"left over: {left}")

    def tell(self) -> str:
        """The ends of all logs."""
        logs = sorted((self.run_dir.attempt(self.processes.attempt()) / "logs").glob("*.log"))
        return "\n".join(
            f"== {log}\n{log.read_text(errors='replace')[-1500:]}" for log in [*logs, self.folder / "output.txt"]
        )

    def _seen(self, component: str, pattern: str, after: dict[str, int]) -> bool:
        lines = self.lines(component)
        for number in range(after[component], len(lines)):
            if re.search(pattern, lines[number]):
                after[component] = number + 1
                return True
        return False
