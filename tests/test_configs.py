"""Every configuration that is shipped can be loaded, and what it names is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from specbatch.config import dump_config, load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = sorted(CONFIGS.glob("**/*.yaml"))


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
