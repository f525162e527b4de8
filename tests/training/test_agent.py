"""Restarts of ranks, and the error when they are not restarted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from specbatch.errors import AttemptError, RunError, UserError
from specbatch.training import EXIT_ATTEMPT, EXIT_FINAL, EXIT_USER
from specbatch.training.process.agent import explain
from specbatch.training.replay_rank import log_path


def failed(folder: Path, codes: dict[int, int], logs: dict[int, str]) -> tuple[RunResult, Callable[[int], Path]]:
    for rank, text in logs.items():
        log_path(folder, rank).write_text(text)
    failures = {rank: ProcessFailure(rank, 1234, code, "") for rank, code in codes.items()}
    return RunResult(state=WorkerState.FAILED, failures=failures), partial(log_path, folder)


def test_the_rank_that_was_killed_is_named_before_those_that_noticed(tmp_path: Path) -> None:
    logs = {0: "connection reset\n", 1: "working\n"}
    with pytest.raises(RunError, match=r"training rank 1 was killed by signal 9.*\n.*working"):
        explain(*failed(tmp_path, {0: 1, 1: -9}, logs))


def test_the_users_mistake_is_told_in_the_ranks_own_words(tmp_path: Path) -> None:
    logs = {0: "traceback\nthe snapshot is of another training\n", 1: "ended\n"}
    with pytest.raises(UserError, match=r"^the snapshot is of another training$"):
        explain(*failed(tmp_path, {0: EXIT_USER, 1: 1}, logs))


def test_a_broken_pack_is_told_with_the_log_that_tells_more(tmp_path: Path) -> None:
    logs = {1: "traceback\nthe loss of step 5 is not finite\n"}
    with pytest.raises(RunError, match=r"^the loss of step 5 is not finite \(.*training-1\.log\)$"):
        explain(*failed(tmp_path, {1: EXIT_FINAL}, logs))
    with pytest.raises(RunError, match=r"^the loss of step 5 is not finite$"):
        explain(*failed(tmp_path, {1: EXIT_FINAL}, logs), logs_stay=False)


def test_a_dispatcher_that_is_gone_ends_the_attempt_and_not_the_run(tmp_path: Path) -> None:
    logs = {0: "traceback\nthe dispatcher did not answer\n", 1: "ended\n"}
    with pytest.raises(AttemptError, match=r"^the dispatcher did not answer \("):
        explain(*failed(tmp_path, {0: EXIT_ATTEMPT, 1: -15}, logs))
