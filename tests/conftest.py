"""Target models for the tests: a tiny random one, and the quickstart's real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.phantoms import PHANTOMS
from tests.tiny_target import make_tiny_target

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with light tests first, since they take longest: the quick ones fill the time until two workers are at
    their end."""
    long = {item.path for item in items if item.get_closest_marker("light")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session", autouse=True)
def _state_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs of the tests are not those of the user who tests."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    yield
    if before is None:
        del os.environ["XDG_STATE_HOME"]
    else:
        os.environ["XDG_STATE_HOME"] = before


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 6 layers, hidden size 64 and 512 tokens, with tokenizer and ChatML template; read only."""
    return make_tiny_target(tmp_path_factory.mktemp("target") / "tiny")


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Callable[[str], Path]:
    """Directories of `tests.phantoms`, by name, with the tiny target's tokenizer; read only.

    The tokenizer has names for as many tokens as a draft's vocabulary needs.
    """
    folder = tmp_path_factory.mktemp("phantoms")
    (folder / "tokenizer").mkdir()
    tokenizer = json.loads((tiny_target / "tokenizer.json").read_text())
    first = len(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] |= {f"<filler{i}>": i for i in range(first, 33000)}
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(tiny_target / "tokenizer_config.json", folder / "tokenizer")

    @cache
    def of(name: str) -> Path:
        return PHANTOMS[name].write(folder / name, tokenizer=folder / "tokenizer")

    return of


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The real SmolLM2-135M-Instruct, where the quickstart has it; read only."""
    subprocess.run([REPOSITORY / "tools" / "make_target"], check=True, stdout=subprocess.DEVNULL)
    return REPOSITORY / ".cache" / "smollm2-135m-instruct"
