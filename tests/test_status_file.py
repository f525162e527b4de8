"""Reading a run's status, also of other versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from specbatch.errors import UserError
from specbatch.status_file import EngineStatus, Status, VoidPack, read_status, write_status


@pytest.mark.parametrize("durable", [True, False])
def test_a_write_leaves_one_whole_file_that_says_the_same(tmp_path: Path, durable: bool):
    path = tmp_path / "status.json"
    for step in range(3):
        status = Status(step=step, engines=(EngineStatus("a", "ready"),), void=(VoidPack("0.1", "why"),))
        write_status(path, status, durable=durable)
    assert [each.name for each in tmp_path.iterdir()] == ["status.json"]
    assert read_status(path) == status


def test_what_an_older_or_a_newer_version_wrote_can_be_read(tmp_path: Path):
    path = tmp_path / "status.json"
    assert read_status(path) is None
    path.write_text('{"state": "stopped", "attempt": 2, "idleness": 0.1, "engines": [{"name": "a", "state": "ready"}]}')
    assert read_status(path) == Status(state="stopped", attempt=2, engines=(EngineStatus("a", "ready"),))


@pytest.mark.parametrize(
    ("text", "why"), [("{", "is not JSON"), ('{"step": "two"}', "is not the status of a run: .*step")]
)
def test_what_is_damaged_is_named(tmp_path: Path, text: str, why: str):
    path = tmp_path / "status.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"status\.json: {why}"):
        read_status(path)
