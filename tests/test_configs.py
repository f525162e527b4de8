"""Every configuration that is shipped can be loaded, and what it names is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from specbatch.cli import main
from specbatch.config import Config, dump_config, load_config
from specbatch.config.engine_nodes import nodes_per_engine
from specbatch.drafts.base import algorithm_of
from specbatch.gpu_kinds import GPUS
from specbatch.inference.resolution import check_blocks, check_room
from specbatch.planning import Known, budget
from specbatch.slurm.check_request import check_request
from specbatch.slurm.submit import script_of
from specbatch.target import read_target
from specbatch.training.preflight import RESERVE_BYTES

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = sorted(CONFIGS.glob("**/*.yaml"))
TARGETS = {
    **{name: name for name in ("qwen3-8b", "llama-3.1-8b", "gpt-oss-20b", "gpt-oss-120b", "qwen3-30b-a3b")},
    **{name: name for name in ("deepseek-v3.1", "kimi-k2.5", "gemma-3-27b")},
    "qwen3-235b-a22b": "qwen3-235b-a22b-fp8",
    "glm-4.6": "glm-4.6-fp8",
}
"""Configurations, and the phantoms of their targets."""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_configuration_loads_and_survives_printing(path: Path, tmp_path: Path):
    config = load_config(path)
    printed = tmp_path / "printed.yaml"
    printed.write_text(dump_config(config))
    assert load_config(printed) == config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_each_key_of_a_shipped_configuration_is_explained(path: Path):
    keys = [line for line in path.read_text().splitlines() if line.startswith("  ")]
    assert [line for line in keys if "  # " not in line] == []


def test_the_conversations_of_the_quickstart_are_there():
    config = load_config(CONFIGS / "quickstart.yaml")
    assert all(Path(name).is_file() for name in [*config.data.train, *config.data.heldout])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a few conversations."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, count in (("train", 60), ("heldout", 6)):
        answer = {"role": "assistant", "content": "so it is " * 20}
        rows = [{"messages": [{"role": "user", "content": f"{name} {i}"}, answer]} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def on_phantom(name: str, target: Path, corpus: Path, folder: Path, *overrides: str) -> Config:
    """A shipped configuration with a target of the right size and a few conversations."""
    data = (
        f"{{train: [{corpus}/train.jsonl], heldout: [{corpus}/heldout.jsonl], workers: 1, cache_dir: {corpus}/cache}}"
    )
    given = [f"--target.path={target}", f"--run.dir={folder}/run", f"--slurm.shared_dirs=[{folder}, {corpus}]"]
    given += [f"--data.{key}={value}" for key, value in yaml.safe_load(data).items()]
    return load_config(CONFIGS / f"{name}.yaml", [*given, *overrides])


def test_there_is_a_configuration_for_each_of_these_targets():
    assert {path.stem for path in SHIPPED} == {*TARGETS, "quickstart", "dflash-by-heart"}


@pytest.mark.parametrize("name", TARGETS)
def test_a_configuration_holds_for_a_target_of_real_size(
    name: str, phantom: Callable[[str], Path], corpus: Path, tmp_path: Path
):
    config = on_phantom(name, phantom(TARGETS[name]), corpus, tmp_path, "--training.warmup_steps=0")
    found = budget(config, Known())
    assert found.warnings == []
    layout = found.layout
    assert layout.devices == 8 * (config.slurm.inference.nodes + config.slurm.training.nodes)
    assert layout.room_bytes >= 4 * config.training.packs_per_step * config.training.tokens_per_pack * (
        found.work.full_token_bytes
    )
    target, kind = read_target(config.target.path), GPUS[config.inference.gpu]
    assert sum(algorithm_of(config, target).memory().values()) <= GPUS[config.training.gpu].memory_bytes - RESERVE_BYTES
    check_room(config, target, kind, 0.8)
    check_blocks(config, target)
    # SGLang itself is asked in a test of its own.
    said: list[str] = []
    script = script_of(on_phantom(name, phantom(TARGETS[name]), corpus, tmp_path, "--inference.gpu="), said.append)
    assert said == []
    assert f"--nodes={config.slurm.inference.nodes}" in script


@pytest.mark.parametrize(
    ("name", "gpus", "nodes"),
    [
        ("qwen3-8b", "h100:8", 4),
        ("gpt-oss-120b", "h200:8", 1),
        ("glm-4.6", "b200:8", 3),
        ("deepseek-v3.1", "h100:8", 4),
    ],
)
def test_init_writes_a_configuration_that_holds(
    name: str, gpus: str, nodes: int, phantom: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["init", "--target", str(phantom(name)), "--gpus", gpus, "--nodes", str(nodes)]) == 0
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    config = load_config(tmp_path / "a.yaml", [f"--run.dir={tmp_path}/run"])
    assert all(
        len(line) <= 120 for line in (tmp_path / "a.yaml").read_text().splitlines() if str(phantom(name)) not in line
    )
    used = config.inference.engines * config.inference.tensor_parallel + config.training.ranks
    assert used == 8 * nodes
    assert config.training.packs_per_step % config.training.ranks == 0
    if nodes > 1:
        assert nodes_per_engine(config) == (2 if name == "deepseek-v3.1" else 1)
        assert check_request(config) == []


def test_init_says_where_a_target_has_no_room(
    phantom: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def refused(target: str | Path, *words: str) -> str:
        assert main(["init", "--target", str(phantom(target) if isinstance(target, str) else target), *words]) == 2
        return capsys.readouterr().err

    assert "no engine fits one such node" in refused("deepseek-v3.1", "--gpus", "h100:8", "--nodes", "2")
    assert "give --nodes 2" in refused("deepseek-v3.1", "--gpus", "h200:8")
    assert "h101 is not one of the GPUs" in refused("qwen3-8b", "--gpus", "h101:8")
    assert "write the kind and the number" in refused("qwen3-8b", "--gpus", "h100")
    for file in phantom("qwen3-8b").iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["GraniteForCausalLM"]}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "hands out no hidden states" in refused(tmp_path, "--gpus", "h100:8")
