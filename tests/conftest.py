"""Target models for the tests: a tiny random one, and the quickstart's real one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_target import make_tiny_target

REPOSITORY = Path(__file__).resolve().parents[1]


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
def smollm() -> Path:
    """The real SmolLM2-135M-Instruct, where the quickstart has it; read only."""
    subprocess.run([REPOSITORY / "tools" / "make_target"], check=True, stdout=subprocess.DEVNULL)
    return REPOSITORY / ".cache" / "smollm2-135m-instruct"
