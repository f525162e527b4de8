"""The table, the rates, the exit code, and what is remembered of a doctor that passed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specbatch.cli import main
from specbatch.config import Config, load_config
from specbatch.doctor.finding import Finding, failed, not_checked, write_findings
from specbatch.doctor.job import render_doctor
from specbatch.doctor.outcome import as_json, collect, passed, print_table, remember, works, write_rates
from specbatch.errors import UserError
from specbatch.planning import Known
from specbatch.planning.rates import _of_file
from specbatch.rundir import RunDir

TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, how are you?"}]}


@pytest.fixture
def path(tmp_path: Path, tiny_target: Path) -> Path:
    (tmp_path / "a.jsonl").write_text((json.dumps(TALK) + "\n") * 20)
    found = tmp_path / "a.yaml"
    found.write_text(
        f"run: {{dir: '{tmp_path}/run', name: a b}}\ntarget: {{path: '{tiny_target}'}}\n"
        "data: {train: [a.jsonl], max_tokens: 64}\ndraft: {vocab_size: 64}\n"
        "training: {ranks: 2, tokens_per_pack: 64, packs_per_step: 2}\ninference: {engines: 2}\n"
        "store: {bytes_per_rank: 64MiB}\nevaluate: {prompts: 0}\nslurm: {inference: {nodes: 2, setup: ['true']}}\n"
    )
    return found


@pytest.fixture
def config(path: Path) -> Config:
    return load_config(path)


def find(root: Path, name: str, *findings: Finding) -> None:
    write_findings(root / "findings" / f"{name}.json", list(findings))


def test_equal_findings_are_told_once_and_others_with_their_nodes(config: Config, tmp_path: Path, capsys):
    interface = Finding("network interface", "10.0.0.1")
    find(tmp_path, "head-0", Finding("node", "n1"), interface)
    find(
        tmp_path,
        "inference-0",
        Finding("node", "n2"),
        Finding("GPUs", "4"),
        Finding("prefill", "[1]", rates={"engine": 3.0}),
    )
    find(
        tmp_path,
        "inference-1",
        Finding("node", "n3"),
        failed("GPUs", "3", "4", "look"),
        Finding("prefill", "[1]", rates={"engine": 2.0}),
    )
    (tmp_path / "doctor.log").write_text("training: line 2: /no/python: No such file or directory\n")
    found = collect(config, tmp_path, slurm=True)
    assert found["head"] == [interface]
    assert [finding.found for finding in found["inference"]] == ["4 (on n2)", "[1]", "3 (on n3)"]
    # A task that never began is a failure too, in bash's words.
    assert [(finding.verdict, "/no/python: No such file" in finding.found) for finding in found["training"]] == [
        ("failed", True)
    ]
    assert not works(found)
    assert as_json(found, tmp_path)["findings"]["inference"][2]["remedy"] == "look"
    print_table(found)
    shown = capsys.readouterr().out
    assert "failed" in shown
    assert "[1]" in shown
    rates = write_rates(found, tmp_path)
    assert rates is not None
    assert json.loads(rates.read_text())["engine"] in (2.0, 3.0)


def test_a_rate_that_was_not_measured_is_said(tmp_path: Path):
    rates = write_rates({"training": [Finding("step", "x", rates={"rank_flops_per_s": 2e12})]}, tmp_path)
    assert rates is not None
    assert _of_file(rates, "rank_flops_per_s").flops_per_s == 2e12
    with pytest.raises(UserError, match="has no engine_flops_per_s: it is not a file of rates of `specbatch doctor`"):
        _of_file(rates, "engine_flops_per_s")
    assert Known(like=rates).like == rates
    assert write_rates({"training": [not_checked("step", "see above")]}, tmp_path / "none") is None


def test_a_doctor_that_passed_is_remembered_for_its_profile(path: Path):
    plain, site = load_config(path), load_config(path, ["--slurm.profile=perlmutter", "--slurm.account=x"])
    assert not passed(plain)
    remember(plain)
    assert passed(plain)
    assert not passed(site)


def test_a_run_that_only_answers_is_refused(path: Path, capsys):
    assert main(["doctor", "--config", str(path), "--run.goal=answers"]) == 2
    assert "run.goal: answers: the doctor checks runs that train a draft" in capsys.readouterr().err
    assert not list(path.parent.glob("*-doctor"))


def test_the_job_has_the_run_s_own_layout_and_a_time_of_its_own(config: Config, tmp_path: Path):
    config.slurm.inference.setup.append("module load cuda")
    lines = render_doctor(config, RunDir(tmp_path)).splitlines()
    assert lines.count("#SBATCH hetjob") == 2
    assert "#SBATCH --job-name=a-b-doctor-engines" in lines
    assert "#SBATCH --time=00:26:00" in lines
    assert not [line for line in lines if "submitit" in line]
    assert "module load cuda" in lines
    assert [line for line in lines if line.startswith("on_") and "doctor" in line] == [
        "on_head specbatch.doctor.task head &",
        "on_training specbatch.doctor.task training &",
        "on_inference specbatch.doctor.task inference",
    ]


@pytest.mark.light
@pytest.mark.timeout(240)
def test_on_this_machine_what_it_has_is_looked_at_and_what_needs_gpus_is_left_to_the_job(path: Path, capsys):
    # With GPUs asked for and none here: an engine on the CPU would say nothing of the run.
    asked = ["--slurm.inference.gpus_per_node=1", "--slurm.training.gpus_per_node=2"]
    code = main(["doctor", "--config", str(path), "--json", *asked])
    said = json.loads(capsys.readouterr().out)
    verdicts = {
        name: {finding["what"]: finding["verdict"] for finding in findings}
        for name, findings in said["findings"].items()
    }
    assert (code, said["works"]) == (0, True), said
    assert verdicts["inference"]["store"] == "ok"
    assert verdicts["training"]["network to inference"] == "ok"
    assert verdicts["inference"]["captured rows"] == verdicts["training"]["training step"] == "not checked"
    (why,) = {finding["found"] for finding in said["findings"]["training"] if finding["what"] == "attention"}
    assert why == "this machine has no GPU, but the job requests some: --submit checks there"
    # Broken, it is the exit code, and the directory is the doctor's to use again.
    code = main(["doctor", "--config", str(path), *asked, "--slurm.interface=hsn9", "--data.train=[/no/talks.jsonl]"])
    shown = capsys.readouterr().out
    assert code == 1
    (data,) = [
        finding["found"]
        for finding in json.loads((path.parent / "run-doctor" / "findings" / "head-0.json").read_text())
        if finding["what"] == "the run's data"
    ]
    assert data == "/no/talks.jsonl: no such file or directory"
    assert "the run would break: see the lines marked failed" in shown
    (path.parent / "run-doctor" / ".specbatch").unlink()
    assert main(["doctor", "--config", str(path)]) == 2
    assert "the doctor would write there, and did not make it" in capsys.readouterr().err
