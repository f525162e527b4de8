"""The logs of components as one."""

from __future__ import annotations

import queue
import threading

import pytest

from specbatch.errors import UserError
from specbatch.run.logs import follow_logs, print_logs
from specbatch.rundir import RunDir, write_json


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path)


def write(run_dir, attempt, component, text, task=0):
    path = run_dir.component_log(attempt, component, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def printed(run_dir, which=""):
    lines = []
    print_logs(run_dir, which, lambda name, line: lines.append((name, line)))
    return lines


def test_lines_of_all_components_come_in_the_order_of_time(run_dir):
    write(run_dir, 1, "head", "2026-01-01 10:00:00,001 head-0 INFO a\n2026-01-01 10:00:02,000 head-0 INFO d\n")
    write(run_dir, 1, "engine", "[2026-01-01 10:00:01] b\n  of b\n[2026-01-01 10:00:03.5] e\n")
    write(run_dir, 1, "training", "early\n2026-01-01 10:00:01,900 training-0 INFO c\nTraceback\ncut off")
    words = [line.rpartition(" ")[2] for _, line in printed(run_dir)]
    assert words == ["early", "a", "b", "b", "c", "Traceback", "off", "d", "e"]
    assert printed(run_dir)[3] == ("engine-0", "  of b")


def test_a_component_or_one_task_of_it_can_be_chosen(run_dir):
    for component, task in (("inference", 0), ("inference", 1), ("training", 0), ("added-12", 3)):
        write(run_dir, 1, component, f"{component} {task}\n", task)
    assert [line for _, line in printed(run_dir, "inference")] == ["inference 0", "inference 1"]
    assert [line for _, line in printed(run_dir, "inference-1")] == ["inference 1"]
    assert [line for _, line in printed(run_dir, "added")] == ["added-12 3"]
    with pytest.raises(UserError, match="added-12-3, inference-0, inference-1, training-0"):
        printed(run_dir, "inference-2")


def test_only_the_newest_attempt_is_shown(run_dir):
    write(run_dir, 9, "head", "old\n")
    write(run_dir, 10, "head", "new\n")
    assert printed(run_dir) == [("head-0", "new")]


def test_what_the_newest_job_printed_is_shown_too(run_dir):
    (run_dir.root / "job.log").write_text(
        "2026-01-01 09:00:00 specbatch: job 6, restart 0, on node1\nof job 6\n"
        "2026-01-01 10:00:00 specbatch: job 7, restart 0, on node1\nsrun: error\n"
    )
    assert [line.split()[-1] for _, line in printed(run_dir)] == ["node1", "error"]
    write(run_dir, 1, "head", "2026-01-01 10:00:01,000 head-0 INFO a\n")
    assert [name for name, _ in printed(run_dir)] == ["job", "job", "head-0"]
    assert [line for _, line in printed(run_dir, "job")][1:] == ["srun: error"]


def test_a_run_without_logs_says_so(run_dir):
    with pytest.raises(UserError, match="none yet"):
        printed(run_dir)


def test_following_goes_on_in_a_new_attempt_and_ends_with_the_run(run_dir):
    write(run_dir, 1, "head", "".join(f"2026-01-01 10:00:00,{n:03d} x {n}\n" for n in range(100)))
    write_json(run_dir.status, {"attempt": 1, "state": "running"})
    shown: queue.Queue[tuple[str, str]] = queue.Queue()
    follower = threading.Thread(
        target=follow_logs, args=(run_dir, "", lambda *line: shown.put(line)), kwargs={"poll_s": 0.01}, daemon=True
    )
    follower.start()

    def following():
        return shown.get(timeout=10)[1].split()[-1]

    assert [following() for _ in range(20)] == [str(n) for n in range(80, 100)]
    write(run_dir, 1, "head", "2026-01-01 10:00:01,000 x half")
    write(run_dir, 1, "training", "2026-01-01 10:00:02,000 y late\n")
    assert following() == "late"
    write(run_dir, 1, "head", "-whole\n")
    assert following() == "half-whole"
    # A job's run that was stopped goes on in another attempt.
    run_dir.jobs.mkdir()
    write_json(run_dir.status, {"attempt": 1, "state": "stopped"})
    write(run_dir, 2, "head", "2026-01-01 10:10:00,000 x again\n")
    assert shown.get(timeout=10) == ("", "attempt 2")
    assert following() == "again"
    write(run_dir, 2, "head", "2026-01-01 10:10:00,000 x end\n")
    write_json(run_dir.status, {"attempt": 2, "state": "completed"})
    assert following() == "end"
    follower.join(timeout=10)
    assert not follower.is_alive()
    assert shown.empty()
