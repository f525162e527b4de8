"""The first rows are judged without torch, in the words of the preparation itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from specbatch.config import dump_config, load_config
from specbatch.errors import UserError
from specbatch.slurm.first_rows import check_first_rows

TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, how are you?"}]}


def test_good_rows_say_nothing_and_bad_ones_their_reason_and_torch_stays_out(tmp_path: Path, tiny_target: Path):
    (tmp_path / "good.jsonl").write_text((json.dumps(TALK) + "\n") * 20)
    (tmp_path / "bad.jsonl").write_text('{"question": "Hi"}\n' * 20)
    path = tmp_path / "a.yaml"
    path.write_text(f"run: {{dir: run}}\ntarget: {{path: '{tiny_target}'}}\ndata: {{train: [good.jsonl]}}\n")
    config = load_config(path)
    assert check_first_rows(config).warnings == []
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        check_first_rows(load_config(path, ["--data.train=[bad.jsonl]"]))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config))
    imports = "import sys; from pathlib import Path; from specbatch.slurm.first_rows import main"
    ran = subprocess.run(
        [sys.executable, "-c", f"{imports}; main(Path(sys.argv[1])); print('torch' in sys.modules)", resolved],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.splitlines()[-1] == "False"
