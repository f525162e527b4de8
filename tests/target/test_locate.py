"""Targets are found in directories and in the cache of the hub, or it is said how to get them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from specbatch.errors import UserError
from specbatch.target import locate, read_target


def test_what_is_no_model_directory_is_said_so(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_target(tmp_path)
    with pytest.raises(UserError, match="there is no directory"):
        read_target(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_target(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 8}')
    with pytest.raises(UserError, match="no num_hidden_layers"):
        read_target(tmp_path)


@pytest.mark.light
def test_a_hub_name_that_is_not_in_the_cache_says_how_to_get_it(tmp_path):
    code = "from specbatch.target import locate; locate('specbatch-tests/no-such-model')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert "not in the cache" in done.stderr
    assert "download it with `hf download specbatch-tests/no-such-model`" in done.stderr


def test_a_hub_name_is_found_in_the_cache(tiny_target, tmp_path):
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_target, repository / "snapshots" / commit)
    code = "from specbatch.target import read_target; print(read_target('org/tiny').path)"
    env = {"PATH": "", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert Path(done.stdout.strip()) == repository / "snapshots" / commit


def test_a_directory_is_located_as_it_is(tiny_target):
    assert locate(tiny_target) == tiny_target.resolve()
