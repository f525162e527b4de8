"""Start the trainer ranks of this node, and start them again when one dies: torch's own elastic agent.

A rank that dies takes the others with it: all go on from the newest snapshot, in new processes. That is bounded by
`training.max_restarts` for as long as no step is trained that had not been trained before.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import LogsDest

from specbatch.config import load_config
from specbatch.errors import AttemptError, RunError, UserError
from specbatch.patience import Patience
from specbatch.rundir import RunDir
from specbatch.training import EXIT_ATTEMPT, EXIT_FINAL, EXIT_USER
from specbatch.training.meeting import ManyNodes, OneNode
from specbatch.training.metrics_file import last_step
from specbatch.training.place import ALONE, Place
from specbatch.training.signals import ask_to_stop, watch

log = logging.getLogger(__name__)

_UNBOUNDED = 1 << 30
"""Restarts that torch's agent would do; this module counts for itself."""
_TAIL_LINES = 20
_MONITOR_S = 0.2
_NO_CURE = {EXIT_USER, EXIT_FINAL, EXIT_ATTEMPT}
"""Exit codes of ranks that would end in the same way again."""


def main(run_dir: Path, attempt: int, starts: int = 0, place: Place = ALONE) -> None:
    """Train with all ranks of this node; returns when training has ended, by its last step or by being stopped.

    Args:
        starts: how often this attempt's training was started before: agents die, too.
        place: which of the training nodes this is. Where there are several, ranks that die end the attempt.

    Must be called by the main thread. SIGTERM, SIGINT and SIGUSR2 become a request to the dispatcher to stop, and do
    nothing else: ranks end by themselves once their snapshot is on disk.

    Raises:
        UserError: what a rank says the user can mend.
        AttemptError: the dispatcher is gone.
        RunError: a rank can't go on, or died too often; with the end of its log.
    """
    paths = RunDir(run_dir)
    config = load_config(paths.config)
    watch(lambda number, sender: ask_to_stop(paths.rendezvous(attempt), attempt, f"training got {number.name}"))
    # torch's agent would end the ranks at a signal. It has to have one of its own: only for "at once".
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    # All nodes have equally many ranks, so agents need not tell each other.
    os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"
    spec = WorkerSpec(
        role="training",
        local_world_size=config.training.ranks // place.nodes,
        entrypoint=sys.executable,
        args=("-m", "specbatch.training.rank", str(run_dir), str(attempt), str(starts)),
        rdzv_handler=OneNode(f"attempt-{attempt}") if place.nodes == 1 else ManyNodes(paths, attempt, place),
        max_restarts=_UNBOUNDED,
        monitor_interval=_MONITOR_S,
        local_addr=place.address,
    )
    most = config.training.max_restarts if place.nodes == 1 else 0
    agent = Agent(spec, progress=lambda: last_step(paths.metrics), most=most)
    result = agent.run()
    if result.is_failed():
        explain(paths, result, attempt, final=place.nodes == 1)


class Agent(LocalElasticAgent):
    """Torch's agent, with patience.

    Args:
        progress: highest step trained so far.
        most: restarts without progress.
    """

    def __init__(self, spec: WorkerSpec, *, progress: Callable[[], int], most: int) -> None:
        super().__init__(spec, _Inherited())
        self._progress, self._patience = progress, Patience(progress(), most)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY) and not self._try_again(result):
            self._remaining_restarts = 0
        return result

    def _exit_barrier(self) -> None:
        """Nobody waits for the agents of other nodes: the head does. They share no store, and would wait for ever."""

    def _try_again(self, result: RunResult) -> bool:
        codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        reached = self._progress()
        again = self._patience.again(reached) and not _NO_CURE.intersection(codes.values())
        log.warning("ranks died exit_codes=%s step=%d restart=%s", codes, reached, "yes" if again else "no")
        return again


class _Inherited(LogsSpecs):
    """Ranks open their logs by themselves, to append; what they print before goes where the agent prints."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nothing = dict.fromkeys(envs, "")
        return LogsDest(stdouts=nothing, stderrs=nothing, error_files=nothing)

    @property
    def root_log_dir(self) -> str:
        return ""


def explain(paths: RunDir, result: RunResult, attempt: int, final: bool = True) -> NoReturn:
    """Raise what made the ranks end, in their own words: of a rank that knows why, else of one that did not
    merely notice that another was gone.

    Args:
        final: whether ranks were started again until it was no use.

    Raises:
        UserError: the user can mend it.
        AttemptError: another attempt may do better.
        RunError: anything else.
    """
    codes = {rank: failure.exitcode for rank, failure in sorted(result.failures.items())}
    known = [rank for rank, code in codes.items() if code in _NO_CURE]
    rank = next(iter(known + [rank for rank, code in codes.items() if code != 1] + list(codes)))
    path = paths.component_log(attempt, "training", rank)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    if rank in known and lines:
        if codes[rank] == EXIT_USER:
            raise UserError(lines[-1])
        known_kind = AttemptError if codes[rank] == EXIT_ATTEMPT else RunError
        raise known_kind(f"{lines[-1]} ({path})")
    end = "\n".join(lines[-_TAIL_LINES:])
    how = f"was killed by signal {-codes[rank]}" if codes[rank] < 0 else f"exited with code {codes[rank]}"
    kind = RunError if final else AttemptError
    raise kind(f"training rank {rank} {how}; the end of {path}:\n{end}")
