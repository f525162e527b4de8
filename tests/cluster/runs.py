"""Runs of a tiny target on the cluster, and what happens to them."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from specbatch.metrics_lines import last_step
from specbatch.run.attempts import Attempt, last_status, read_attempt
from specbatch.rundir import RunDir, read_json
from specbatch.slurm.jobs import read_jobs
from specbatch.snapshot.manifest import whole_snapshots
from specbatch.status_file import Status
from tools.lab import Lab

STEPS = 60
SAME = ("step", "loss", "losses", "accuracy", "grad_norm", "learning_rate", "tokens", "loss_tokens", "void_packs")
"""Results of a run that must not depend on what happened to it."""
POLL_S = 0.1


class Run:
    """A run of the cluster's ordinary user.

    Args:
        folder: holds the conversations and the target ``tiny``, and gets the run's directory.
        name: of the run directory.
        slurm: the section of the configuration, in YAML's flow style.
        engine: further settings of the section ``inference``.
    """

    def __init__(self, lab: Lab, folder: Path, name: str, slurm: str = "{}", engine: str = "") -> None:
        self.lab, self.folder = lab, folder
        self.suffered = 0
        """The newest attempt that something happened to."""
        self.failure = ""
        """Why it did not come to its end."""
        self.run_dir = RunDir(folder / name)
        self.config = folder / f"{name}.yaml"
        self.config.write_text(
            f"""
run: {{dir: {json.dumps(str(self.run_dir.root))}, seed: 3, log_interval_s: 5, stall_timeout_s: 300}}
target: {{path: ./tiny}}
data: {{train: [talks.jsonl], heldout: [others.jsonl], max_tokens: 256, workers: 1, cache_dir: cache}}
draft: {{ttt_steps: 3, vocab_size: 64}}
training: {{ranks: 1, threads: 1, tokens_per_pack: 256, packs_per_step: 8, epochs: 8, max_steps: {STEPS},
  dtype: float32, learning_rate: 1e-3, warmup_steps: 2}}
inference: {{threads: 1, deterministic: true, heartbeat_s: 2{engine and f", {engine}"}}}
store: {{bytes_per_rank: 16MiB}}
snapshot: {{interval: 5}}
evaluate: {{prompts: 0}}
slurm: {slurm}
"""
        )

    def user(self, *argv: str) -> str:
        """Run a command of the user on the login node, and return its output."""
        where = {"env": self.lab.user_environment(), "cwd": self.folder}
        done = subprocess.run(
            [*self.lab.as_user(), *argv], **where, text=True, capture_output=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{argv}: exit {done.returncode}\n{done.stdout}{done.stderr}\n{self}"
        return done.stdout

    def specbatch(self, verb: str, *words: str) -> str:
        """Run a verb as the user on the login node, and return its output."""
        return self.user(sys.executable, "-m", "specbatch", verb, *words)

    def doing(self, verb: str, *words: str) -> Callable[[], bool]:
        """The same in the background, while other runs go on; returns whether it is done.

        Raises:
            AssertionError: it failed.
        """
        argv = [*self.lab.as_user(), sys.executable, "-m", "specbatch", verb, *words]
        said = self.config.with_suffix(f".{verb}")
        with said.open("w") as output:
            process = subprocess.Popen(
                argv, env=self.lab.user_environment(), cwd=self.folder, stdout=output, stderr=output
            )

        def look() -> bool:
            code = process.poll()
            assert not code, f"{verb}: exit {code}\n{said.read_text()}\n{self}"
            return code is not None

        return look

    def submit(self) -> Callable[[], bool]:
        """Submit it; returns whether that is done."""
        return self.doing("submit", "--config", str(self.config))

    # -- how it stands -----------------------------------------------------------------------------------------------

    def step(self) -> int:
        """The last one that was trained."""
        return last_step(self.run_dir.metrics)

    def attempt(self, number: int = 0) -> Attempt:
        """Return an attempt, which has the nodes of its components; by default the newest."""
        found = read_attempt(self.run_dir, number or self.run_dir.attempts()[-1])
        assert found is not None
        return found

    def node(self, component: str) -> str:
        """The first node of a component in the newest attempt."""
        return self.attempt().nodes[component][0]

    def status(self) -> dict[str, Any]:
        """Return the last status of the head."""
        return read_json(self.run_dir.status) or {}

    def last_status(self, attempt: int) -> Status:
        """Return the last status of an attempt's head."""
        found = last_status(self.run_dir, attempt)
        assert found is not None
        return found

    def state(self) -> str:
        """The state that `specbatch status` shows."""
        return json.loads(self.specbatch("status", str(self.run_dir.root), "--json"))["state"]

    def prepared(self) -> bool:
        """Whether an engine can join its first attempt."""
        return self.run_dir.corpus.exists() and self.run_dir.rendezvous(1).exists()

    def events(self, attempt: int = 0) -> list[dict[str, Any]]:
        """Events of an attempt, the newest if not given; a line that is being written is left out."""
        attempts = [attempt] if attempt else self.run_dir.attempts()
        path = self.run_dir.events(attempts[-1]) if attempts else self.run_dir.root
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []

    def added(self) -> list[dict[str, Any]]:
        """Events of engines that joined from other jobs."""
        return [event for event in self.events() if event.get("engine", "").startswith("added-")]

    def added_works(self) -> bool:
        """Whether one of them has stored a pack."""
        return any(event["event"] == "stored" for event in self.added())

    def let_own_engine_start(self) -> None:
        """Create the file that its setup may wait for."""
        (self.run_dir.root / "go").touch()

    def added_node(self) -> str:
        """Return the node of the first added engine."""
        job = read_jobs(self.run_dir, "engines")[0].id
        return self.lab.run("squeue", "--noheader", f"--jobs={job}", "--format=%N").split()[0]

    def first_steps(self) -> dict[int, int]:
        """The first step that each attempt trained; of those that trained one."""
        found = {}
        for number in self.run_dir.attempts():
            steps = [event["step"] for event in self.events(number) if event["event"] == "trained"]
            found |= {number: steps[0]} if steps else {}
        return found

    def snapshots(self) -> list[int]:
        """Steps of its snapshots."""
        return whole_snapshots(self.run_dir.snapshots)

    def jobs(self) -> dict[str, str]:
        """State of each of its Slurm jobs that has not ended, components and engines that joined included."""
        ids = {str(job.id) for job in read_jobs(self.run_dir)}
        rows = self.lab.run("squeue", "--noheader", "--all", "--format=%i %T").splitlines()
        found = dict(row.split() for row in rows)
        return {job: state for job, state in found.items() if re.split(r"[+_]", job)[0] in ids}

    def ended(self) -> bool:
        """Whether it is over for good: nothing of it runs, and nothing waits."""
        return bool(read_jobs(self.run_dir)) and not self.jobs()

    def stop_engine(self) -> None:
        """SIGSTOP to the SGLang of its newest attempt."""
        for process in psutil.process_iter(["cmdline"]):
            if "sglang.launch_server" in (process.info["cmdline"] or []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.environ().get("SLURM_JOB_ID") == str(self.attempt().job):
                        for each in [*process.children(recursive=True), process]:
                            each.suspend()

    def take_away(self) -> None:
        """End all that is left of it."""
        if jobs := {re.split(r"[+_]", job)[0] for job in self.jobs()}:
            self.lab.run("scancel", "--quiet", *jobs)

    def reaches(self, step: int) -> Callable[[], bool]:
        """Whether it has trained so many steps, and does in an attempt that nothing happened to yet.

        Raises:
            AssertionError: it has ended before.
        """

        def look() -> bool:
            ended, status = self.ended(), self.status()
            trains = (status.get("state"), status.get("stage")) == ("running", "training")
            if trains and status["attempt"] > self.suffered and self.step() >= step:
                self.suffered = status["attempt"]
                return True
            assert not ended, f"the run ended before step {step} in an attempt after {self.suffered}\n{self}"
            return False

        return look

    def numbers(self) -> list[tuple[str, ...]]:
        """Return the trained steps in order; a run that succeeded has each step once."""
        rows = [json.loads(line) for line in self.run_dir.metrics.read_text().splitlines()]
        return [tuple(json.dumps(row[key]) for key in SAME) for row in rows]

    def draft(self) -> bytes:
        """The weights that came out."""
        return (self.run_dir.export / "model.safetensors").read_bytes()

    def __str__(self) -> str:
        """Everything that helps to understand a failure."""
        logs = [self.run_dir.root / "job.log", *sorted(self.run_dir.root.glob("attempts/*/logs/*.log"))]
        tails = [f"== {path}\n{path.read_text(errors='replace')[-1500:]}" for path in logs if path.exists()]
        return "\n".join([f"{self.run_dir.root}: step {self.step()}, {self.status()}", *tails])


class Local(Run):
    """A run on one machine, without Slurm."""

    def submit(self) -> Callable[[], bool]:
        """Start it on the login node; returns whether it has come to its end."""
        return self.doing("run", "--config", str(self.config))

    def ended(self) -> bool:
        """Return true: nothing is left once its foreground process has ended."""
        return True


class Foreground(Run):
    """A run in the foreground, on nodes that its user has asked for: ``salloc ... specbatch run``."""

    def submit(self) -> Callable[[], bool]:
        """Start it on three nodes."""
        self.on_nodes(3, "run", "--config", str(self.config))
        return self.run_dir.status.exists

    def on_nodes(self, nodes: int, *words: str) -> None:
        """Start a command in an allocation of its own."""
        asked = ["--partition=cpu", "--exclude=node[1-18,22-27]", f"--nodes={nodes}", "--mem=4G", "--time=30"]
        with self.config.with_suffix(".said").open("a") as output:
            self.process = subprocess.Popen(
                [*self.lab.as_user(), "salloc", *asked, sys.executable, "-m", "specbatch", *words],
                env=self.lab.user_environment(),
                cwd=self.folder,
                stdout=output,
                stderr=output,
            )

    def interrupt(self) -> None:
        """Ctrl-C, which salloc leaves to what runs in it."""
        command = psutil.Process(self.process.pid)
        for process in [command, *command.children(recursive=True)]:
            # The components' processes come and go.
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "salloc":
                    for child in process.children():
                        child.send_signal(signal.SIGINT)

    def leader(self, number: int) -> str:
        """The host of the process that leads an attempt; empty before it has begun."""
        found = read_attempt(self.run_dir, number)
        return found.host if found else ""

    def ended(self) -> bool:
        """The command has ended, and with it the allocation."""
        return self.process.poll() is not None

    def take_away(self) -> None:
        """End the command."""
        self.process.terminate()

    def __str__(self) -> str:
        """What it said, too."""
        return f"{self.config.with_suffix('.said').read_text()}\n{super().__str__()}"


class ByHand(Run):
    """A run from the templates, as their user edits them."""

    TEMPLATES = Path(__file__).resolve().parents[2] / "slurm"

    def submit(self) -> Callable[[], bool]:
        """Submit the edited template; all else is in its job."""
        self._submit("het", {"config": self.config, "run": self.run_dir.root})
        return self.run_dir.status.exists

    def submit_engine(self) -> None:
        """Submit one engine that joins."""
        self._submit("engine", {"run": self.run_dir.root})

    def _submit(self, name: str, paths: dict[str, Path]) -> None:
        text = (self.TEMPLATES / f"{name}.sbatch").read_text()
        for variable, value in {**paths, "python": sys.executable}.items():
            text = re.sub(rf"^{variable}=.*$", f"{variable}={shlex.quote(str(value))}", text, flags=re.M)
        # No GPUs, and nodes that are small and not these.
        edits = {r"--partition=\w+": "--partition=cpu --exclude=node[1-18,22-27]", r"--gpus-per-node=\d+ ?": "",
                 r"--mem=\w+": "--mem=4G", r"--ntasks-per-node=4": "--ntasks-per-node=1", r"--array=1-2": "--array=1-1",
                 r"--time=\S+": "--time=30"}  # fmt: skip
        for pattern, replacement in edits.items():
            text = re.sub(pattern, replacement, text)
        script = self.folder / f"{self.run_dir.root.name}-{name}.sbatch"
        script.write_text(text)
        self.user("sbatch", str(script))


Story = Callable[[Run], Iterator[Callable[[], bool]]]
"""Events of a run in order: a generator of conditions that have to become true before the next event."""


def play(stories: Mapping[Run, Story], timeout_s: float, at_once: int) -> None:
    """Submit runs and let everything happen to them, side by side, until all have ended.

    One that does not end as told is left with its `Run.failure`, and its jobs are taken away.

    Args:
        at_once: how many runs at most go on at a time; the first ones come first.
    """
    until = time.monotonic() + timeout_s
    waiting = list(stories.items())
    going: dict[Run, tuple[Iterator[Callable[[], bool]], Callable[[], bool]]] = {}
    while waiting or going:
        if waiting and len(going) < at_once:
            run, story = waiting.pop(0)
            going[run] = story(run), run.submit()
        for run, (events, is_time) in list(going.items()):
            try:
                assert time.monotonic() < until, f"did not end within {timeout_s:.0f} s of the first\n{run}"
                then = next(events, None) if is_time() else is_time
            except AssertionError as error:
                run.failure, then = str(error), None
                run.take_away()
            if then is None:
                del going[run]
            else:
                going[run] = events, then
        time.sleep(POLL_S)
