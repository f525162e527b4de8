"""The command as people type it: verbs, exit codes, and messages without tracebacks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from specbatch.cli import VERBS, main
from specbatch.config import dump_config, load_config

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def config(tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.yaml"
    path.write_text(
        f"run: {{dir: run}}\ntarget: {{path: '{tiny_target}'}}\n"
        "data: {train: [train.jsonl], heldout: [heldout.jsonl], max_tokens: 256, cache_dir: cache}\n"
        "draft: {vocab_size: 256}\ntraining: {tokens_per_pack: 512}\n"
    )
    return path


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "specbatch", *arguments], capture_output=True, text=True)


def test_help_names_every_verb_and_comes_at_once():
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        done = run_command("--help")
        seconds.append(time.monotonic() - began)
    assert done.returncode == 0
    assert all(f"  {verb} " in done.stdout for verb in VERBS)
    # Half a second is the promise; a machine that runs other tests at the same time gets some more.
    assert min(seconds) < 1.0


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from specbatch.cli import main; main(['--help']); "
        "heavy = ('torch', 'sglang', 'transformers', 'datasets', 'numpy', 'jsonargparse', 'yaml', 'rich'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        raise SystemExit(main([verb, "--help"]))
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: specbatch {verb}")


def test_the_help_of_run_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    shown = capsys.readouterr().out
    assert "--training.learning_rate" in shown
    assert "Highest learning rate of AdamW. A number above 0." in " ".join(shown.split())


def test_without_a_verb_there_is_help_and_the_exit_code_of_a_mistake(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: specbatch VERB")


def test_a_verb_that_does_not_exist_is_named_with_the_nearest(capsys):
    assert main(["rum"]) == 2
    assert capsys.readouterr().err == "specbatch: rum: there is no such verb; did you mean run?\n"


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("specbatch ")


def test_what_print_config_prints_is_a_configuration(config, capsys):
    assert main(["run", "--config", str(config), "--training.learning_rate", "1e-3", "--print_config"]) == 0
    printed = config.parent / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again = load_config(printed)
    assert again == load_config(config, ["--training.learning_rate", "1e-3"])
    assert again.training.learning_rate == 1e-3
    assert main(["run", "--config", str(printed), "--print_config"]) == 0
    assert capsys.readouterr().out == printed.read_text()


def test_a_configuration_is_asked_for(capsys):
    assert main(["run"]) == 2
    assert capsys.readouterr().err.startswith("specbatch: --config: is missing")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("--training.lrr 3", "command line: training.lrr: there is no such key; did you mean training.learning_rate?"),
        (
            "--inference.tensor_parallel 3",
            "a.yaml: inference.tensor_parallel: 3 does not divide the target's 4 attention heads; try 2 or 4",
        ),
    ],
)
def test_a_mistake_is_one_line_without_a_traceback(config, overrides, message):
    done = run_command("run", "--config", "a.yaml", *overrides.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"specbatch: {message}\n"
    assert not (config.parent / "run").exists()


@pytest.mark.light
def test_ctrl_c_is_one_line_and_its_own_exit_code(tmp_path):
    # Opening a pipe to read blocks until a writer opens it.
    pipe = tmp_path / "a.yaml"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "specbatch", "run", "--config", str(pipe)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        pipe.open("w"),
    ):
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "specbatch: interrupted\n")
    assert process.returncode == 130


@pytest.mark.light
def test_a_reader_that_leaves_early_is_no_defect(tmp_path):
    command = f"'{sys.executable}' -m specbatch run --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "usage: specbatch run --config FILE [--SECTION.FIELD VALUE ...]\n"
    assert done.stderr == ""


def test_data_shows_what_a_sample_becomes(config, capsys):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day to you."}]
    for name in ("train", "heldout"):
        (config.parent / f"{name}.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    assert main(["data", "--config", str(config), "--sample", "1", "--data.workers", "1"]) == 0
    assert "[[Good day to you.<|im_end|>]]" in capsys.readouterr().out


def test_data_that_are_missing_are_the_users_mistake(config, capsys):
    assert main(["data", "--config", str(config)]) == 2
    assert "train.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["resume", "status", "export", "evaluate"])
def test_what_is_no_run_directory_is_said_so(verb, tmp_path, capsys):
    assert main([verb, str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"specbatch: {tmp_path}: is not a run directory: it has no config.yaml; start a run with `specbatch run`\n"
    )


def test_an_option_that_a_verb_does_not_have_is_refused(tmp_path, capsys):
    assert main(["status", str(tmp_path), "--jsn"]) == 2
    assert (
        capsys.readouterr().err
        == "specbatch: --jsn: is not an option of `specbatch status`; see `specbatch status --help`\n"
    )


def test_regenerate_checks_its_options(capsys, tiny_target, tmp_path):
    assert main(["regenerate", "--target", "x", "--input", "a.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("specbatch: command line: output: is missing: ")
    options = ["--target", str(tiny_target), "--input", "a.jsonl", "--output", str(tmp_path / "run")]
    assert main(["regenerate", *options, "--temprature", "1"]) == 2
    assert "did you mean temperature?" in capsys.readouterr().err
    assert main(["regenerate", *options, "--sglang.mem_fraction_statc", "1"]) == 2
    assert "sglang.mem_fraction_statc: SGLang " in capsys.readouterr().err


def test_evaluate_takes_the_runs_own_settings_unless_told(config, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(load_config(config)))
    assert main(["evaluate", str(run), "--prompts", "x"]) == 2
    assert capsys.readouterr().err == "specbatch: command line: prompts: x is not an integer of at least 0\n"
    assert main(["evaluate", str(run), "--promts", "3"]) == 2
    assert "did you mean prompts?" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--sweep.batch_size", "[1]"]) == 2
    assert "did you mean sweep.batch_sizes?" in capsys.readouterr().err
    assert main(["evaluate", "--target", "t", "--draft", "d"]) == 2
    assert "--heldout: name files of conversations, or a benchmark" in capsys.readouterr().err
    assert main(["evaluate", "--target", "t"]) == 2
    assert "--draft: is missing" in capsys.readouterr().err
