"""The job that measures a draft: what it asks for, what it runs, and what is refused before it is queued."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from specbatch.cli import main
from specbatch.config import Config, load_config
from specbatch.config.profile import profiles
from specbatch.errors import UserError
from specbatch.evaluation.subjects import subject_of_draft
from specbatch.run.run_status import read_files, run_status
from specbatch.rundir import EVALUATION_LOG, RunDir, write_json
from specbatch.slurm.check_request import check_request
from specbatch.slurm.evaluation_job import job_config, render_evaluation, words_of
from specbatch.slurm.jobs import record_job
from specbatch.slurm.query import SlurmJobs
from specbatch.slurm.states import JobRow

DRAFT = {
    "architectures": ["LlamaForCausalLMEagle3"], "vocab_size": 512, "draft_vocab_size": 128, "hidden_size": 64,
    "num_hidden_layers": 1,
}  # fmt: skip
SLURM = """
inference: {engines: 8, tensor_parallel: 2}
slurm:
  partition: gpu
  account: nlp
  time: "12:00:00"
  head: {partition: cpu, mem: 1G}
  inference: {nodes: 2, gpus_per_node: 8, cpus_per_task: 16, mem: 64G, setup: [module load cuda], launch: run-in sglang,
    python: /opt/my env/python}
  training: {partition: other, gpus_per_node: 8, mem: 1G}
"""


def write_draft(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(DRAFT | changes))
    save_file({"fc.weight": torch.zeros(64, 192)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def desk(tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to type commands in: a draft, held-out conversations and a configuration."""
    write_draft(tmp_path / "draft")
    talk = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
    (tmp_path / "heldout.jsonl").write_text((json.dumps(talk) + "\n") * 8)
    (tmp_path / "my.yaml").write_text(
        f"run: {{dir: runs/my, name: 'kimi k2: a/b'}}\ntarget: {{path: '{tiny_target}'}}\n"
        f"data: {{train: [train.jsonl], heldout: [heldout.jsonl]}}\nevaluate: {{prompts: 4}}\n{SLURM}"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def job(desk: Path) -> Callable[..., Config]:
    """The job's configuration for a published draft, with overrides of ``my.yaml``."""

    def make(*overrides: str, own_limit: bool = False) -> Config:
        subject = subject_of_draft(desk / "draft", load_config(desk / "my.yaml", overrides))
        found = job_config(subject, desk / "out", own_limit=own_limit)
        check_request(found)
        return found

    return make


def directives(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")}


def test_the_job_asks_for_one_node_with_what_an_engine_has(job, desk: Path):
    script = render_evaluation(job(), ["--config=config.yaml", "--draft=/a b/draft", "--out=."])
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert {
        "--job-name=kimi-k2-a-b-evaluate", "--account=nlp", "--partition=gpu", "--nodes=1", "--ntasks-per-node=1",
        "--gpus-per-node=2", "--cpus-per-task=16", "--mem=64G", "--requeue", f"--output={desk}/out/evaluate.log",
    } <= directives(script)  # fmt: skip
    assert not any(line.startswith(("--signal", "--no-requeue", "hetjob")) for line in directives(script))
    srun = script[script.index("srun ") : script.index("\ncode=")].replace("\\\n", "")
    words = shlex.split(srun)
    assert words[:3] == ["srun", "--nodes=1", "--ntasks=1"]
    inside = words[words.index("-c") + 1].splitlines()
    assert "module load cuda" in inside
    assert inside[-1] == 'exec run-in sglang "$@"'
    assert words[-7:] == [
        "-u", "-m", "specbatch", "evaluate", "--config=config.yaml", "--draft=/a b/draft", "--out=.",
    ]  # fmt: skip
    assert words[-8] == "/opt/my env/python"


def test_its_time_limit_is_what_engines_may_take_to_start_and_an_hour_if_a_run_may_take_that(job):
    # Two engines of a quarter of an hour each; three with another number of draft tokens.
    assert job().slurm.time == "01:31:00"
    assert job("--evaluate.sweep.draft_tokens=[2]").slurm.time == "01:46:00"
    assert job("--inference.start_timeout_s=60").slurm.time == "01:02:00"
    assert job("--slurm.time=20:00").slurm.time == "00:20:00"
    assert job("--slurm.time=5:00:00", own_limit=True).slurm.time == "05:00:00"


def test_where_all_nodes_are_alike_it_asks_for_what_training_asks_for(job):
    given = ("--slurm.layout=single", "--slurm.partition=", "--slurm.inference.mem=")
    assert {"--partition=other", "--mem=1G", "--gpus-per-node=2"} <= directives(render_evaluation(job(*given), []))
    whole = render_evaluation(job("--slurm.whole_nodes=true"), [])
    assert "--gpus-per-node=8" in directives(whole)


@pytest.mark.parametrize("name", profiles())
def test_a_profile_gives_a_job_without_what_its_site_forbids(desk: Path, tiny_target: Path, name: str):
    (desk / "my.yaml").write_text(
        f"run: {{dir: runs/my}}\ntarget: {{path: '{tiny_target}'}}\n"
        f"data: {{train: [train.jsonl], heldout: [heldout.jsonl]}}\nslurm: {{profile: {name}, account: project}}\n"
    )
    config = load_config(desk / "my.yaml")
    found = job_config(subject_of_draft(desk / "draft", config), desk / "out")
    check_request(found)
    asked = directives(render_evaluation(found, []))
    assert {"--nodes=1", "--account=project"} <= asked
    assert ("--gpus-per-node=1" in asked) == (name == "plain")
    for directive, why in config.slurm.forbidden.items():
        assert isinstance(why, dict) or not any(line.partition("=")[0] == f"--{directive}" for line in asked)


def test_an_engine_that_is_larger_than_a_node_is_refused(job):
    with pytest.raises(UserError, match=r"inference.tensor_parallel: 16 needs 2 nodes, and --submit measures on one"):
        job("--inference.tensor_parallel=16")


def test_options_of_the_command_line_reach_the_job(desk: Path):
    own = load_config(desk / "my.yaml").evaluate
    assert list(words_of(own, own)) == []
    given = ["--evaluate.prompts=6", "--evaluate.sweep.batch_sizes=[1,8]", "--evaluate.sets.gsm8k=it's.jsonl",
             "--evaluate.dtype=float32"]  # fmt: skip
    wanted = load_config(desk / "my.yaml", given).evaluate
    words = list(words_of(wanted, own))
    assert "--prompts=6" in words
    assert load_config(desk / "my.yaml", [f"--evaluate.{word[2:]}" for word in words]).evaluate == wanted
    assert wanted.sets == {"gsm8k": str(desk / "it's.jsonl")}


def test_mistakes_are_one_line_before_slurm_is_asked(
    desk: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(desk))
    write_draft(desk / "spark", architectures=["Qwen3DSparkModel"], block_size=4)
    write_draft(desk / "other", vocab_size=511)

    def refuses(words: str, message: str) -> None:
        assert main(["evaluate", *shlex.split(words)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err.splitlines()[-1]
        assert "Traceback" not in err

    refuses("--config my.yaml --submit", "--draft: is missing")
    refuses("--config my.yaml --draft nowhere --submit", "nowhere has no config.json: not the directory of a draft")
    refuses("--config my.yaml --draft other --submit", "vocab_size is 511, but the target")
    refuses("--config my.yaml --draft draft --heldout gone.jsonl --submit", "gone.jsonl: no such file or directory")
    refuses(
        "--config my.yaml --draft draft --sweep.batch_sizes=[64] --submit", "64 requests at once are more than the 4"
    )
    refuses("--config my.yaml --draft draft --prompts 0 --submit", "evaluate.prompts is 0: nothing to measure")
    refuses(
        "--config my.yaml --draft draft --promts 3 --submit",
        "command line: promts: there is no such key; did you mean prompts?",
    )
    refuses("--config my.yaml --draft draft --submit --json", "--json: --submit queues a job and prints no result")
    refuses("--config my.yaml --draft draft --slurm.time=1:00", "--slurm.time: belongs to --submit")
    # On a CPU SGLang has no worker for it, whichever CPU that is.
    dspark = "spark: SGLang does not run drafts of DSpark on a CPU; "
    cpu = f"--draft spark --target '{tiny_target}' --heldout heldout.jsonl --draft_tokens 4"
    refuses(f"{cpu} --submit", f"{dspark}ask for GPUs: slurm.inference.gpus_per_node")
    refuses(f"{cpu} --submit --slurm.inference.gpus_per_node=1", "no Slurm here: `scontrol` is not in PATH")
    refuses(cpu, f"{dspark}use a machine with a GPU")
    refuses("--config my.yaml --draft draft --submit", "no Slurm here: `scontrol` is not in PATH")
    run_dir = RunDir(desk / "run")
    run_dir.make()
    run_dir.config.write_text((desk / "my.yaml").read_text())
    refuses(
        "--config my.yaml --draft draft --submit --slurm.inference.gpus_per_node=2 --inference.tensor_parallel=2"
        " --slurm.stage_target=/dev/shm --slurm.inference.mem=1K",
        "slurm.inference.mem: 1K is less than the",
    )
    refuses("--config my.yaml --draft draft --submit --out run", "run is the directory of a run, or of something else")
    refuses("run --submit", "run has no exported draft yet: make it with `specbatch export")
    refuses("run --heldout heldout.jsonl --submit", "--heldout: a run has its own")
    refuses("run --target.dtype float32 --submit", "--target.dtype: a run has its own")
    assert not (desk / "evaluation-draft").exists()
    assert sorted(path.name for path in run_dir.root.iterdir()) == [".specbatch", "config.yaml"]


def test_a_configuration_gives_target_data_engine_and_settings(desk: Path):
    """Its own draft, which it would train, does not matter."""
    config = load_config(desk / "my.yaml", ["--draft.algorithm=dspark"])
    write_draft(
        desk / "flash", architectures=["DFlashDraftModel"], block_size=4, num_hidden_layers=2,
        dflash_config={"mask_token_id": 400, "target_layer_ids": [1, 2, 3]},
    )  # fmt: skip
    subject = subject_of_draft(desk / "flash", replace(config))
    assert (subject.config.draft.algorithm, subject.algorithm.proposals) == ("dflash", 3)
    assert (subject.config.draft.num_layers, subject.config.draft.aux_layers) == (2, [1, 2, 3])
    assert (subject.settings.prompts, subject.config.inference.tensor_parallel) == (4, 2)


def test_status_and_logs_show_the_measurement(
    desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(desk))
    run_dir = RunDir(desk / "out")
    run_dir.make()
    run_dir.config.write_text((desk / "my.yaml").read_text())
    record_job(run_dir, 12, kind="evaluation")
    (run_dir.root / EVALUATION_LOG).write_text(
        "of another job\n2026-01-01 00:00:00 specbatch: job 12, restart 0, on n1\nspecbatch: no\n"
    )

    def state(answer: SlurmJobs, later_s: float = 100.0) -> tuple[str, str]:
        found = run_status(read_files(run_dir), answer, time.time() + later_s)
        return found.state, found.why

    waits = SlurmJobs({12: [JobRow(12, 0, 12, "PENDING", reason="Priority")]})
    assert state(waits)[0] == "pending"
    assert "Priority" in state(waits)[1]
    assert state(SlurmJobs({12: [JobRow(12, 0, 12, "RUNNING")]})) == ("running", "")
    # The queue that squeue reads may be a second older than the job.
    assert state(SlurmJobs(), 1.0)[0] == "pending"
    over = SlurmJobs({}, {12: [JobRow(12, 0, 12, "FAILED", exit_code="2:0")]})
    assert state(over) == ("failed", "job 12 left no result: FAILED: its script failed with exit code 2")
    assert state(SlurmJobs()) == ("failed", "job 12 left no result")
    assert state(SlurmJobs({}, {12: [JobRow(12, 0, 12, "CANCELLED", user=0)]}))[0] == "cancelled"
    monkeypatch.setattr("specbatch.slurm.query.query_jobs", lambda *_: over)
    assert main(["status", "out"]) == 0
    told = capsys.readouterr().out
    assert "failed with exit code 2; the end of out/evaluate.log:" in told
    assert "of another job" not in told
    assert told.endswith("    specbatch: no\n")  # and nothing says that it could be resumed
    write_json(
        run_dir.evaluation, {"acceptance_length": 1.934, "identical": 4, "prompts": 4, "draft": str(desk / "draft")}
    )
    assert state(over) == ("completed", "")
    assert main(["status", "out"]) == 0
    told = capsys.readouterr().out
    assert (
        "measured  acceptance length 1.93 (plain decoding 1.00), output identical on 4 of 4 prompts, draft in" in told
    )
    assert "specbatch: no" not in told
    assert main(["logs", "out", "evaluate"]) == 0
    assert "evaluate     | specbatch: no" in capsys.readouterr().out
