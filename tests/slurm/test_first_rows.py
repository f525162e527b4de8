"""The first rows are judged without torch, in the words of the preparation itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from specbatch.config import dump_config, load_config
from specbatch.errors import UserError
from specbatch.slurm.first_rows import check_first_rows
from specbatch.slurm.shared_paths import check_image_folders
from tools.targets.checkpoints import make_checkpoint

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


def test_directories_of_images_are_found_and_those_that_nodes_do_not_see_are_refused(tmp_path: Path):
    target = make_checkpoint("Mistral-3-Images", tmp_path / "target")
    PIL.Image.new("RGB", (56, 28)).save(tmp_path / "a.png")
    content = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What is it?"}]
    talk = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A licence."}]}
    (tmp_path / "seen.jsonl").write_text(json.dumps(talk) + "\n")
    path = tmp_path / "a.yaml"
    path.write_text(
        f"run: {{dir: run}}\ntarget: {{path: '{target}'}}\n"
        "data: {train: [seen.jsonl], images: true, cache_dir: c, max_tokens: 512}\ndraft: {vocab_size: null}\n"
        "training: {packs_per_step: 1, warmup_steps: 0}\nslurm: {shared_dirs: [/]}\n"
        "evaluate: {prompts: 0}\n"
    )
    config = load_config(path)
    assert check_first_rows(config).image_folders == [tmp_path]
    plan = [sys.executable, "-m", "specbatch", "plan", "--config", path, "--json"]
    assert json.loads(subprocess.run(plan, capture_output=True, check=True).stdout)
    assert check_image_folders(config, [Path("/dev/shm")]) == []
    config.slurm.shared_dirs = []
    with pytest.raises(UserError, match=r"data\.images: /dev/shm is below /dev, .* compute nodes don't see it"):
        check_image_folders(config, [Path("/dev/shm")])
