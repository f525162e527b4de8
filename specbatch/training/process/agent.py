"""Starts the trainer ranks of this node, and restarts them when one dies, with torch's own elastic agent.

When a rank dies, all ranks on all nodes continue from the newest snapshot in new processes, while the engines stay as
they are. `training.max_restarts` limits such restarts without a step that had not been trained before.
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
from specbatch.metrics_lines import last_step
from specbatch.process_log import log_tail
from specbatch.restart_policy import RestartPolicy
from specbatch.rundir import RunDir
from specbatch.training import EXIT_ATTEMPT, EXIT_FINAL, EXIT_USER
from specbatch.training.process.node import ALONE, TrainingNode
from specbatch.training.process.rendezvous import LOOPBACK, ManyNodes, OneNode
from specbatch.training.process.signals import ask_to_stop, watch

log = logging.getLogger(__name__)

_UNBOUNDED = 1 << 30
"""Limit of restarts for torch's agent; this module counts restarts itself."""
_TAIL_LINES = 20
_MONITOR_S = 0.2
_NO_CURE = {EXIT_USER, EXIT_FINAL, EXIT_ATTEMPT}
"""Exit codes of ranks that would fail in the same way after a restart."""


def main(run_dir: Path, attempt: int, starts: int = 0, place: TrainingNode = ALONE) -> None:
    """Train with all ranks of this node; returns when training has reached its last step or was stopped.

    Args:
        starts: number of earlier starts of this attempt's training, since agents die, too.
        place: position among the training nodes. If there are several, ranks that die too often end the attempt and not
            the run, since the next attempt may get other nodes.

    Must be called by the main thread. SIGTERM, SIGINT and SIGUSR2 become a request to the dispatcher to stop, and do
    nothing else: ranks end by themselves once their snapshot is on disk.

    Raises:
        UserError: a rank reports what the user can mend.
        AttemptError: the dispatcher is gone.
        RunError: a rank can't continue, or died too often; with the end of its log.
    """
    paths = RunDir(run_dir)
    config = load_config(paths.config)
    watch(lambda number, sender: ask_to_stop(paths.rendezvous(attempt), attempt, f"training got {number.name}"))
    # All nodes have the same number of ranks, so agents don't have to exchange it.
    os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"
    result = run_ranks(
        ["specbatch.training.process.rank", str(run_dir), str(attempt), str(starts)],
        config.training.ranks // place.nodes,
        OneNode(f"attempt-{attempt}") if place.nodes == 1 else ManyNodes(paths, attempt, starts, place),
        address=place.address,
        progress=lambda: last_step(paths.metrics),
        most=config.training.max_restarts,
    )
    if result.is_failed():
        explain(result, lambda rank: paths.component_log(attempt, "training", rank), final=place.nodes == 1)


def run_ranks(
    module: list[str],
    ranks: int,
    rendezvous: OneNode,
    *,
    address: str = LOOPBACK,
    progress: Callable[[], int] = lambda: 0,
    most: int = 0,
) -> RunResult:
    """Run the ranks of this node under torch's agent until they end.

    Args:
        module: the module that each rank runs, and its arguments.
        address: address of this node.
        progress: highest step trained so far.
        most: how often ranks that died are restarted without progress.
    """
    # torch's agent ends the ranks at these signals, and needs at least one: SIGQUIT, which means "at once" anyway.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    spec = WorkerSpec(
        role="training",
        local_world_size=ranks,
        entrypoint=sys.executable,
        args=("-m", *module),
        rdzv_handler=rendezvous,
        max_restarts=_UNBOUNDED,
        monitor_interval=_MONITOR_S,
        local_addr=address,
    )
    return Agent(spec, progress=progress, most=most).run()


class Agent(LocalElasticAgent):
    """Torch's agent, which limits only those restarts of ranks that made no progress.

    Args:
        progress: highest step trained so far.
        most: restarts without progress.
    """

    def __init__(self, spec: WorkerSpec, *, progress: Callable[[], int], most: int) -> None:
        super().__init__(spec, _Inherited())
        self._progress, self._patience = progress, RestartPolicy(progress(), most)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY) and not self._try_again(result):
            self._remaining_restarts = 0
        return result

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        meeting = worker_group.spec.rdzv_handler
        if isinstance(meeting, ManyNodes):
            # Ranks report the number of restarts, by which the dispatcher tells their generations apart. It is the same
            # on all nodes, although some have seen more deaths than others.
            self._remaining_restarts = worker_group.spec.max_restarts - meeting.generation

    def _exit_barrier(self) -> None:
        """Do not wait for the agents of other nodes: the head does, and agents share no store, so they would wait
        forever."""

    def _try_again(self, result: RunResult) -> bool:
        codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        reached = self._progress()
        again = self._patience.again(reached) and not _NO_CURE.intersection(codes.values())
        log.warning("ranks died exit_codes=%s step=%d restart=%s", codes, reached, "yes" if again else "no")
        return again


class _Inherited(LogsSpecs):
    """Leaves logs to the ranks, which append to their own; output before that goes to the agent's output."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        nothing = dict.fromkeys(envs, "")
        return LogsDest(stdouts=nothing, stderrs=nothing, error_files=nothing)

    @property
    def root_log_dir(self) -> str:
        return ""


def explain(
    result: RunResult, log_of: Callable[[int], Path], *, final: bool = True, logs_stay: bool = True
) -> NoReturn:
    """Raise the reason why the ranks ended, in their own words: from a rank that knows it, else from one that did not
    merely notice the end of another.

    Args:
        log_of: returns the log file of a rank.
        final: whether ranks were restarted as often as allowed, so that the run ends, too.
        logs_stay: whether logs still exist afterwards.

    Raises:
        UserError: the user can mend it.
        AttemptError: another attempt may do better.
        RunError: anything else.
    """
    codes = {rank: failure.exitcode for rank, failure in sorted(result.failures.items())}
    known = [rank for rank, code in codes.items() if code in _NO_CURE]
    rank = next(iter(known + [rank for rank, code in codes.items() if code != 1] + list(codes)))
    path = log_of(rank)
    lines = log_tail(path, _TAIL_LINES)
    if rank in known and lines:
        if codes[rank] == EXIT_USER:
            raise UserError(lines[-1])
        known_kind = AttemptError if codes[rank] == EXIT_ATTEMPT else RunError
        raise known_kind(f"{lines[-1]} ({path})" if logs_stay else lines[-1])
    how = f"was killed by signal {-codes[rank]}" if codes[rank] < 0 else f"exited with code {codes[rank]}"
    kind = RunError if final else AttemptError
    end = "\n".join(lines)
    raise kind(f"training rank {rank} {how}; the end of {path if logs_stay else 'its log'}:\n{end}")
