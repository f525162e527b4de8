"""Whole runs on this machine: real SGLang, real Mooncake, real torchtitan, on a tiny target."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 8


@dataclass
class Run:
    """A run directory and how to start it."""

    root: Path
    config: Path

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "specbatch", *arguments]

    def run(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        command = self.command("run", "--config", str(self.config), *overrides)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)

    def resume(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        command = self.command("resume", str(self.root), *overrides)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)

    def start(self, *words: str) -> subprocess.Popen[str]:
        # A session of its own: what a terminal's Ctrl-C does is done by hand.
        return subprocess.Popen(
            self.command(*(words or ("run", "--config", str(self.config)))),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def verb(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*arguments), capture_output=True, text=True, check=True, timeout=60)

    def metrics(self) -> list[dict]:
        path = self.root / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def numbers(self) -> list[tuple]:
        """Results that must not depend on what happened to the run."""
        keys = ("step", "loss", "losses", "accuracy", "grad_norm", "learning_rate", "tokens", "loss_tokens")
        return [tuple(json.dumps(row[key]) for key in keys) for row in self.metrics()]

    def draft(self) -> bytes:
        return (self.root / "export" / "model.safetensors").read_bytes()

    def status(self) -> dict:
        return json.loads((self.root / "status.json").read_text())

    def processes(self) -> list[psutil.Process]:
        """Everything that is left of the run."""
        found = []
        for process in psutil.process_iter():
            try:
                words = [*process.cmdline(), *process.environ().values()]
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            if process.pid != os.getpid() and any(str(self.root) in word for word in words):
                found.append(process)
        return found


def new_run(folder: Path, tiny_target: Path) -> Run:
    folder.mkdir(parents=True)
    draw = random.Random(1)
    words = [
        "sun",
        "rain",
        "warm",
        "cold",
        "and",
        "or",
        "we",
        "like",
        "to",
        "walk",
        "by",
        "sea",
        "in",
        "May",
        "take",
        "a",
        "coat",
    ]
    with (folder / "talks.jsonl").open("w") as talks, (folder / "others.jsonl").open("w") as others:
        for number in range(66):
            ask, answer = (" ".join(draw.choices(words, k=draw.randint(3, 12))) for _ in range(2))
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
            (talks if number < 60 else others).write(json.dumps({"messages": messages}) + "\n")
    run = Run(folder / "run", folder / "run.yaml")
    run.config.write_text(
        f"""
run: {{dir: {json.dumps(str(run.root))}, seed: 3, log_interval_s: 1}}
target: {{path: {json.dumps(str(tiny_target))}}}
data: {{train: [talks.jsonl], heldout: [others.jsonl], max_tokens: 256, cache_dir: cache}}
draft: {{ttt_steps: 3, vocab_size: 64}}
training: {{ranks: 2, threads: 1, tokens_per_pack: 256, packs_per_step: 4, epochs: 8, max_steps: {STEPS},
  dtype: float32, learning_rate: 1e-3, warmup_steps: 2}}
inference: {{threads: 1, deterministic: true, heartbeat_s: 1}}
store: {{bytes_per_rank: 32MiB}}
snapshot: {{interval: 3}}
evaluate: {{prompts: 0}}
"""
    )
    return run


def wait_for_step(run: Run, step: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 300
    while len(run.metrics()) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Run:
    """A run with quotes and spaces in its name that nothing happened to."""
    run = new_run(tmp_path_factory.mktemp("whole") / 'it\'s a "run" $(id) %j', tiny_target)
    done = run.run("--evaluate.prompts", "3", "--evaluate.max_new_tokens", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    run.output = done.stdout  # type: ignore[attr-defined]
    return run


def test_a_run_ends_with_a_draft_and_its_measure(undisturbed):
    evaluation = json.loads((undisturbed.root / "evaluation.json").read_text())
    assert evaluation["prompts"] == evaluation["identical"] == 3
    assert undisturbed.output.splitlines()[-1].startswith("acceptance length ")
    assert "output identical on 3 of 3 prompts" in undisturbed.output.splitlines()[-1]
    card = (undisturbed.root / "export" / "README.md").read_text()
    assert f"**Acceptance length {evaluation['acceptance_length']:.2f}** of at most 4" in card
    status = undisturbed.status()
    assert (status["state"], status["step"], status["steps"]) == ("completed", STEPS, STEPS)
    assert [row["step"] for row in undisturbed.metrics()] == list(range(1, STEPS + 1))


def test_a_run_leaves_no_process_and_tells_its_stages(undisturbed):
    assert undisturbed.processes() == []
    log = (undisturbed.root / "run.log").read_text()
    for stage in ("preparing", "starting engines", "training", "exporting", "evaluating"):
        assert f"{stage} took " in log
    assert (undisturbed.root / "attempts" / "1" / "rendezvous.json").stat().st_mode & 0o777 == 0o600


def test_a_report_knows_all_that_a_run_leaves(undisturbed):
    from specbatch.report.document import document
    from specbatch.report.reading import read_run

    run = document([read_run(undisturbed.root)])["runs"][0]
    (attempt,) = run["attempts"]
    assert attempt["steps"] == run["step"] == run["plan"]["planned"]["steps"] == STEPS
    assert run["tokens"] == run["plan"]["planned"]["tokens"]
    assert all(attempt["parts"][part] > 0 for part in ("start", "training", "after"))
    assert all(any(run["curves"]["mean"][name]) for name in ("loss/0", "accuracy/0", "store", "idle", "grad_norm"))
    assert run["measured"]["prompts"] == 3
    assert 1 <= len(run["answers"]) <= 3


def test_ctrl_c_stops_with_a_snapshot_a_second_one_at_once_and_resume_changes_nothing(
    tmp_path, tiny_target, undisturbed
):
    run = new_run(tmp_path / "stopped", tiny_target)
    process = run.start()
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert f"specbatch resume {os.path.relpath(run.root)}" in output or f"specbatch resume {run.root}" in output
    assert run.processes() == []
    assert run.status()["state"] == "stopped"
    assert len(run.metrics()) < STEPS - 1
    refused = run.resume("--training.learning_rate", "0.5", "--draft.ttt_steps", "2")
    assert refused.returncode == 2
    assert "draft.ttt_steps was 3 and would be 2; training.learning_rate was 0.001 and would be 0.5" in refused.stderr
    process = run.start("resume", str(run.root), "--run.log_interval_s", "2", "--snapshot.keep", "3")
    wait_for_step(run, len(run.metrics()) + 1, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - begun < 20
    assert process.returncode == 130, output
    assert run.processes() == []
    assert "snapshot.keep was 2 and is 3" in output
    (changed,) = json.loads((run.root / "provenance.json").read_text())["changed"]
    assert changed["before_attempt"] == 2
    assert [change["field"] for change in changed["changes"]] == ["run.log_interval_s", "snapshot.keep"]
    assert "keep: 3" in (run.root / "config.yaml").read_text()
    resumed = run.resume()
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    compared = subprocess.run(
        run.command("compare", str(run.root), str(undisturbed.root)), capture_output=True, text=True, check=False
    )
    assert compared.stdout.splitlines()[-1] == "equal, bit for bit", compared.stdout + compared.stderr
    assert run.numbers() == undisturbed.numbers()
    assert run.draft() == undisturbed.draft()
    again = run.resume()
    assert (again.returncode, "complete" in again.stdout) == (0, True)


def test_a_run_directory_of_another_configuration_is_refused(undisturbed):
    done = undisturbed.run("--training.learning_rate", "0.5")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "resume" in done.stderr


def test_added_engines_work_and_vanish_and_a_cancelled_run_stays_so(tmp_path, tiny_target, undisturbed):
    run = new_run(tmp_path / "added", tiny_target)
    process = run.start()
    own = own_engine(run, process, 1)
    # The run's own engine does nothing until another has joined and trained steps with its packs.
    own.suspend()
    added = subprocess.Popen(run.command("engine", str(run.root)), text=True)
    wait_for_step(run, 2, process)
    # The few steps that are left would be trained before two commands have been started.
    ranks = [rank for rank in psutil.process_iter(["cmdline"]) if is_rank(rank, run)]
    assert len(ranks) == 2
    for rank in ranks:
        rank.suspend()
    # The head writes its status every 2 s at most: it may still speak of the step before.
    until = time.monotonic() + 60
    delivered, told = 0, {}
    while delivered < 8:
        assert time.monotonic() < until, told
        told = json.loads(run.verb("status", str(run.root), "--json").stdout)
        assert (told["state"], told["attempt"], told["job"]) == ("running", 1, 0)
        by = {engine["name"].split("-")[0]: engine["packs"] for engine in told["head"]["engines"]}
        delivered = by.get("added", 0)
    own.resume()
    assert "with a snapshot" in run.verb("cancel", str(run.root)).stdout
    for rank in ranks:
        rank.resume()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert added.wait(timeout=60) == 0
    told = run.verb("status", str(run.root)).stdout
    assert f"{run.root}: cancelled, " in told
    assert "cancelled" in told.splitlines()[0]
    lines = run.verb("logs", str(run.root)).stdout.splitlines()
    assert any(line.startswith("added-") and "engine leaves" in line for line in lines)
    # Resumed, it goes on; another engine joins it, and is gone without a word.
    process = subprocess.Popen(
        run.command("resume", str(run.root)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    own = own_engine(run, process, 2)
    own.suspend()
    added = subprocess.Popen(run.command("engine", str(run.root)), start_new_session=True)
    wait_for_step(run, len(run.metrics()) + 1, process)
    os.killpg(added.pid, signal.SIGKILL)
    own.resume()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert run.numbers() == undisturbed.numbers()
    assert run.draft() == undisturbed.draft()
    assert "completed" in run.verb("status", str(run.root)).stdout


def is_rank(process: psutil.Process, run: Run) -> bool:
    """Whether the process is a trainer rank of the run."""
    words = process.info["cmdline"] or []
    return "specbatch.training.process.rank" in words and any(str(run.root) in word for word in words)


def own_engine(run: Run, process: subprocess.Popen[str], attempt: int) -> psutil.Process:
    """The component of the run's only engine, as soon as others can join the attempt."""
    until = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        log = run.root / "attempts" / str(attempt) / "logs" / "inference-0.log"
        if (log.parent.parent / "rendezvous.json").exists() and log.exists():
            found = re.search(r"started pid=(\d+)", log.read_text())
            if found:
                return psutil.Process(int(found[1]))
        time.sleep(0.05)
