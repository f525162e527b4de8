"""The look at a node before an attempt's components start: quick, light, and final where it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specbatch.run.exit_records import read_exit_record
from specbatch.rundir import RunDir


@pytest.fixture
def run_dir(tmp_path: Path, tiny_target: Path) -> RunDir:
    found = RunDir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    found.config.write_text(
        f"run: {{dir: '{tmp_path}'}}\ntarget: {{path: '{tiny_target}'}}\ndata: {{train: [{tmp_path}/a.jsonl]}}\n"
    )
    return found


def look(run_dir: RunDir, component: str) -> subprocess.CompletedProcess[str]:
    words = "import sys; from specbatch.doctor.quick import main; code = main(sys.argv[1]); "
    words += "print('torch' in sys.modules or 'transformers' in sys.modules); sys.exit(code)"
    environment = {**os.environ, "SPECBATCH_ATTEMPT": "1", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
    return subprocess.run(
        [sys.executable, "-c", words, component], cwd=run_dir.root, env=environment, text=True, capture_output=True,
        check=False,
    )  # fmt: skip


def test_a_good_node_leaves_nothing_and_nothing_heavy_is_imported(run_dir: RunDir):
    ran = look(run_dir, "training")
    assert (ran.returncode, ran.stdout) == (0, "False\n"), ran.stderr
    assert not run_dir.ended(1, "training", 2).parent.exists()


def test_what_is_wrong_with_a_node_is_the_task_s_final_record(run_dir: RunDir):
    run_dir.config.write_text(run_dir.config.read_text() + "slurm: {interface: hsn9}\n")
    assert look(run_dir, "inference").returncode == 1
    record = read_exit_record(run_dir, 1, "inference", 2)
    assert record is not None
    assert (record.failed, record.again) == (True, False)
    assert "has no address on hsn9; it has " in record.why
