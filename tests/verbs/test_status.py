"""The output of ``specbatch status``."""

from __future__ import annotations

import datetime
import json
import signal
import subprocess
import sys
import time

import pytest

from specbatch.cli import main
from specbatch.known_runs import register
from specbatch.run.attempts import begin_attempt
from specbatch.run.exit_records import ExitRecord, write_exit_record
from specbatch.rundir import RunDir, write_json
from specbatch.slurm.jobs import record_job


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


def new_run(root, *, state="running", why="", attempt=1):
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text("run:\n  dir: x\n  name: kimi\n")
    run_dir = RunDir(root)
    begin_attempt(run_dir, attempt)
    write_json(
        run_dir.status,
        {
            "state": state, "stage": "training", "step": 12, "steps": 40, "attempt": attempt, "why": why, "ranks": 2,
            "updated": datetime.datetime.now(datetime.UTC).isoformat(),
            "engines": [
                {"name": "engine-0-ab", "state": "ready", "claims": 1, "packs": 9, "tokens_per_s": 5.0,
                 "last_heard_s": 0.1},
                {"name": "added-9.0-cd", "state": "starting", "claims": 0, "packs": 0, "tokens_per_s": 0.0,
                 "last_heard_s": 0.1},
            ],
            "waiting": ["rank 0 waits for pack 0.7", "engine engine-0-ab is ready with 1 packs, heard 0 s ago"],
            "void": [{"pack": "0.3", "why": "NaN"}],
            "refused": {"peers": 2, "messages": 0, "requests": 1},
            "store": {"stored_bytes": 1 << 29, "budget_bytes": 1 << 30},
            "window": {"free": 1, "claimed": 2, "stored": 3},
        },
    )  # fmt: skip
    row = {"step": 12, "loss": 2.5, "tokens": 1000, "seconds": 2.0}
    run_dir.metrics.write_text(json.dumps(row) + "\n")
    return run_dir


def test_all_runs_are_listed_with_what_there_is_to_know(tmp_path, capsys):
    new_run(tmp_path / "runs" / "a")
    elsewhere = new_run(tmp_path / "else where" / "b", state="failed", why="training: it broke\nand how")
    register(elsewhere)
    assert main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["NAME", "STATE", "STAGE", "STEP", "TOKENS/S", "LOSS", "ATTEMPT", "USED", "LEFT", "TO", "GO", "NODE-H", "RUN"],
        ["kimi", "failed", "-", "12/40", "500", "2.500", "1", "-", "-", "-", "0.0", "else", "where/b"],
        ["training:", "it", "broke"],
        ["kimi", "running", "training", "12/40", "500", "2.500", "1", "0:00:00", "-", "0:00:56", "0.0", "runs/a"],
    ]
    assert main(["status", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(run["state"], run["step"], run["loss"]) for run in told["runs"]] == [
        ("failed", 12, 2.5),
        ("running", 12, 2.5),
    ]
    assert told["slurm"] == "answered"


def test_where_there_are_no_runs_that_is_said(capsys):
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "there are no runs yet\n"


def test_one_run_is_told_in_detail(tmp_path, capsys):
    run = new_run(tmp_path / "runs" / "a")
    write_exit_record(run, 1, ExitRecord("inference", 1, "it broke"))
    (run.trackers / "wandb" / "offline-run-20260101_000000-ab").mkdir(parents=True)
    assert main(["status", "runs/a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("runs/a: running, training, step 12 of 40, attempt 1, loss 2.500, 500 tokens/s, 0:00:56 to go")
    assert lines[1:10] == [
        "  time      0:00:00 used; 0.0 node-hours in all",
        "  engines   1 of 2 ready, 2 ranks joined",
        "            engine-0-ab ready, 1 packs in work, 9 done, 5 tokens/s, heard 0 s ago",
        "            added-9.0-cd starting, 0 packs in work, 0 done, 0 tokens/s, heard 0 s ago",
        "  store     50 % of 1.00 GiB; packs of the window: 1 free, 2 claimed, 3 stored",
        "  waiting   rank 0 waits for pack 0.7",
        "  void      pack 0.3 was not trained: NaN",
        "  refused   2 peers, 1 requests: see SECURITY.md",
        "  wandb     wandb sync runs/a/trackers/wandb/offline-run-*",
    ]
    assert lines[10].startswith("  attempt   1: running, step 12, began ")
    assert main(["status", "runs/a", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["head"]["ranks"], told["attempts"][0]["number"], told["failure"]) == (
        "running",
        2,
        1,
        None,
    )


def test_a_failed_run_tells_the_end_of_the_right_log_and_how_to_go_on(tmp_path, capsys):
    run = new_run(tmp_path / "my run", state="failed", why="inference: out of memory")
    write_exit_record(run, 1, ExitRecord("inference", 0, "out of memory"))
    log = run.component_log(1, "inference", 0)
    log.parent.mkdir(parents=True)
    log.write_text("first\nlast words\n")
    assert main(["status", "my run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-5:] == [
        "  inference-0 failed: out of memory",
        "  the end of my run/attempts/1/logs/inference-0.log:",
        "    first",
        "    last words",
        "  go on with: specbatch resume 'my run'",
    ]


@pytest.mark.light
def test_watching_goes_on_until_ctrl_c(tmp_path):
    run = new_run(tmp_path / "runs" / "a")
    watch = subprocess.Popen(
        [sys.executable, "-m", "specbatch", "status", "--watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    heads = [watch.stdout.readline(), watch.stdout.readline()]
    assert heads[0].startswith("NAME")
    assert " 12/40 " in heads[1]
    write_json(run.status, json.loads(run.status.read_text()) | {"step": 13})
    assert watch.stdout.readline() == heads[0]
    assert " 13/40 " in watch.stdout.readline()
    watch.send_signal(signal.SIGINT)
    assert watch.wait(timeout=30) == 130
    assert watch.stderr.read() == "specbatch: interrupted\n"


def test_a_status_without_slurms_answer_says_so(tmp_path, capsys, monkeypatch):
    run = new_run(tmp_path / "runs" / "a")
    record_job(run, 7, size=3)
    monkeypatch.setenv("PATH", str(tmp_path))
    began = time.monotonic()
    assert main(["status"]) == 0
    assert time.monotonic() - began < 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("Slurm gave no answer (squeue: not found on this machine): this is what the runs' own files say")
    assert main(["status", "--json"]) == 0
    assert "not found" in json.loads(capsys.readouterr().out)["slurm"]
