"""`specbatch submit` against a real Slurm: nothing is queued that can't work, and nothing twice."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specbatch.cli import main
from specbatch.config import load_config
from specbatch.config.profile import profiles
from specbatch.rundir import RunDir, write_json
from specbatch.slurm import commands
from specbatch.slurm.balance import read_balances
from specbatch.slurm.jobs import read_jobs
from specbatch.slurm.script import SCRIPT, render
from tools.lab import Lab

pytestmark = [pytest.mark.light, pytest.mark.timeout(180)]

RUN = """\
run: {{dir: '{folder}/run'}}
target: {{path: '{target}'}}
data: {{train: [a.jsonl], max_tokens: 64, cache_dir: cache}}
draft: {{vocab_size: 100, ttt_steps: 2}}
training: {{ranks: 2, tokens_per_pack: 64, packs_per_step: 2, warmup_steps: 0}}
inference: {{engines: 2}}
store: {{bytes_per_rank: 64MiB}}
evaluate: {{prompts: 0}}
slurm:
  time: 30:00
  shared_dirs: [/]
  extra: {{hold: true}}
  head: {{partition: cpu, mem: 1G}}
  inference: {{partition: gpu, gpus_per_node: 2, mem: 4G}}
  training: {{partition: gpu, gpus_per_node: 2, mem: 4G}}
"""
TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, how are you?"}]}


@pytest.fixture
def config(lab: Lab, tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A configuration whose job is held, so that it is queued and never starts."""
    monkeypatch.setenv("SLURM_CONF", str(lab.folder / "slurm.conf"))
    (tmp_path / "a.jsonl").write_text((json.dumps(TALK) + "\n") * 20)
    path = tmp_path / "a.yaml"
    path.write_text(RUN.format(folder=tmp_path, target=tiny_target))
    yield path
    commands.scancel("--me")


@pytest.fixture
def submit(config: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, output and words of a call."""

    def call(*overrides: str) -> tuple[int, str, str]:
        code = main(["submit", "--config", str(config), *overrides])
        return code, *capsys.readouterr()

    return call


def queued() -> list[str]:
    return commands.squeue("--me", "--states=pending,running", "--format=%A").split()


def test_a_run_is_queued_once_and_found_again(submit, config: Path, capsys):
    run_dir = RunDir(config.parent / "run")
    code, out, err = submit()
    assert code == 0
    # What it does is told from the first second, and what it chose: nodes of 8 CPUs and 4 GPUs, two asked of them.
    assert err.splitlines()[0] == "specbatch: checking the configuration and the target"
    assert "specbatch: slurm.inference.cpus_per_task: 2, by an even share of a node's 8 CPUs among its 4 GPUs" in err
    assert "specbatch: slurm.training.cpus_per_task: 4, by an even share" in err
    job = int(queued()[0])
    names = commands.squeue("--me", "--format=%j").split()
    assert sorted(names) == ["run-engines", "run-head", "run-train"]
    assert f"StdOut={run_dir.root}/job.log" in commands.scontrol("show", "job", str(job))
    assert out.splitlines()[:2] == [
        f"job {job}: head on 1 node, inference on 1 node, training on 1 node",
        f"run directory: {run_dir.root}",
    ]
    for word in ("status", "logs -f", "cancel"):
        assert f"  specbatch {word} {run_dir.root}" in out
    assert [entry.id for entry in read_jobs(run_dir)] == [job]
    assert (run_dir.root / SCRIPT).read_text() == render(load_config(run_dir.config), run_dir)
    assert not run_dir.submission.exists()

    again = f"specbatch: {run_dir.root}: is already pending as job {job}; `specbatch status`"
    code, _, err = submit()
    assert (code, err.startswith(again)) == (2, True)
    assert main(["resume", str(run_dir.root)]) == 2
    assert capsys.readouterr().err.startswith(again)
    code, _, err = submit("--training.learning_rate=1e-3")
    assert code == 2
    assert "has another configuration (training.learning_rate: 0.0001, not 0.001); give another run.dir" in err
    assert len(queued()) == 3

    commands.scancel(str(job))
    assert main(["resume", str(run_dir.root)]) == 0
    second = int(queued()[0])
    assert f"job {second}: " in capsys.readouterr().out
    assert [entry.id for entry in read_jobs(run_dir)] == [job, second]


def test_what_is_left_of_the_account_is_said_where_the_site_limits_it(submit, lab: Lab, config: Path, capsys):
    def left(*limits: str) -> list[str]:
        lab.run("sacctmgr", "--immediate", "modify", "account", "lab", "set", f"GrpTRESMins={','.join(limits)}")
        until = time.monotonic() + 20
        while True:
            said = [(line.kind, line.limit_h) for line in read_balances("lab")]
            if len(said) == sum(not limit.endswith("=-1") for limit in limits) or time.monotonic() > until:
                break
            time.sleep(0.2)
        code, out, _ = submit("--slurm.account=lab")
        assert code == 0
        commands.scancel("--me")
        shutil.rmtree(config.parent / "run")
        return [line for line in out.splitlines() if line.startswith("account ")]

    plan = ["plan", "--config", str(config), "--slurm.account=lab"]
    assert main(plan) == 0
    assert "account " not in capsys.readouterr().out, "the site limits nothing"
    first, second = left("node=60000", "gres/gpu=90")
    assert re.fullmatch(r"account lab has [\d,.]+ of 1,000.0 node-hours left", first)
    assert re.fullmatch(
        r"account lab has [\d.]+ of 1.5 GPU-hours left, less than the 2.0 of an attempt: Slurm may hold the job, or .*",
        second,
    )
    assert main(plan) == 0
    assert f"               {first}\n" in capsys.readouterr().out
    assert left("node=-1", "gres/gpu=-1") == []


def test_two_that_submit_the_same_run_at_the_same_time_queue_one_job(config: Path):
    argv = [sys.executable, "-m", "specbatch", "submit", "--config", str(config)]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=150) for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    loser = next(err for process, (_, err) in zip(both, said, strict=True) if process.returncode)
    assert re.search(
        r"is just being submitted by|was (already )?submitted as job|is already pending as job", loser.splitlines()[-1]
    )
    assert len(queued()) == 3
    assert len(read_jobs(RunDir(config.parent / "run"))) == 1


def test_a_submission_that_was_killed_before_it_knew_its_job_is_found_by_the_next(submit, config: Path):
    run_dir = RunDir(config.parent / "run")
    assert submit()[0] == 0
    job = int(queued()[0])
    # As it stood while sbatch was running.
    (run_dir.jobs / f"{job}.json").unlink()
    token = commands.squeue(f"--jobs={job}", "--format=%k").split()[0]
    write_json(run_dir.submission, {"token": token, "time": 0.0})
    code, out, _ = submit()
    assert (code, out.startswith(f"job {job}: ")) == (0, True)
    assert len(queued()) == 3
    assert not run_dir.submission.exists()


def test_nothing_is_queued_or_written_for_bad_input(submit, config: Path, monkeypatch: pytest.MonkeyPatch):
    def refuses(message: str, *overrides: str) -> None:
        code, out, err = submit(*overrides)
        assert (code, out) == (2, "")
        last = err.splitlines()[-1]
        assert last.startswith(f"specbatch: {config}: ")
        assert message in last

    refuses("there is no partition gqu; did you mean gpu?", "--slurm.training.partition=gqu")
    refuses("slurm.account: nobody is not one of your accounts; yours are ", "--slurm.account=nobody")
    refuses("slurm.training.gpus_per_node: 5 GPUs per node are more than the 4", "--slurm.training.gpus_per_node=5")
    refuses("that partition short allows; set slurm.time: 00:02:00", "--slurm.head.partition=short")
    refuses("which is local to each host", "--run.dir=/dev/shm/specbatch-run", "--slurm.shared_dirs=/nowhere")
    code, out, err = submit("--slurm.extra.no-such-thing=1")
    assert (code, out) == (2, "")
    assert (
        "Slurm rejects the job: unrecognized option '--no-such-thing=1'; this cluster's sbatch does not know it" in err
    )
    (config.parent / "run").touch()
    refuses("is a file; give another path")
    (config.parent / "run").unlink()
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PATH", str(config.parent))
        code, out, err = submit()
        assert (code, out) == (2, "")
        assert "no Slurm here: `scontrol` is not in PATH" in err
    bad = (config.parent / "a.jsonl").read_text().replace("assistant", "user")
    (config.parent / "a.jsonl").write_text(bad)
    code, out, err = submit()
    assert (code, out) == (2, "")
    assert "the training data gives no sample out of 20 rows" in err
    assert queued() == []
    assert sorted(path.name for path in config.parent.iterdir()) == ["a.jsonl", "a.yaml"]


def test_a_dry_run_prints_the_script_and_test_only_asks_slurm_and_both_leave_nothing(submit, config: Path):
    code, out, err = submit("--dry-run")
    assert (code, err) == (0, "")
    assert out == render(load_config(config), RunDir(config.parent / "run"))
    code, out, err = submit("--test-only")
    assert code == 0
    assert "warning" not in err
    assert err.startswith("specbatch: checking the configuration")
    assert "to start at" in out
    assert queued() == []
    assert sorted(path.name for path in config.parent.iterdir()) == ["a.jsonl", "a.yaml"]


def test_components_that_slurm_would_never_preempt_together_are_warned_of(submit):
    partitions = ("--slurm.inference.partition=preempt", "--slurm.training.partition=preempt")
    code, _, err = submit("--test-only", *partitions)
    assert code == 0
    assert "only inference (preempt) and training (preempt) may be preempted, head (cpu) not" in err


def test_the_account_that_the_shell_names_is_charged(submit, config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    assert submit()[0] == 0
    assert set(commands.squeue("--me", "--format=%a").split()) == {"lab"}
    assert load_config(config.parent / "run" / "config.yaml").slurm.account == "lab"


@pytest.mark.parametrize("name", profiles())
def test_slurm_takes_a_profile_s_job_on_this_cluster_s_partitions(submit, name: str):
    here = ["--slurm.partition=gpu", "--slurm.forbidden.partition=null", "--slurm.extra.constraint=null"]
    for component, partition in (("head", "cpu"), ("inference", "gpu"), ("training", "gpu")):
        here += [
            f"--slurm.{component}.partition={partition}",
            f"--slurm.{component}.gpus_per_node={2 * (component != 'head')}",
        ]
        here += [f"--slurm.{component}.mem="]
    code, out, _ = submit(
        "--test-only",
        f"--slurm.profile={name}",
        "--slurm.qos=",
        "--slurm.account=lab",
        "--slurm.time=30:00",
        "--slurm.cpus_per_gpu=1",
        *here,
    )
    assert code == 0
    assert "to start at" in out


@pytest.mark.parametrize("name", ["het", "single", "engine"])
def test_slurm_takes_a_template(config: Path, name: str):
    template = Path(__file__).resolve().parents[2] / "slurm" / f"{name}.sbatch"
    assert "to start at" in commands.check(template)
    assert subprocess.run(["bash", "-n", template], check=False).returncode == 0
