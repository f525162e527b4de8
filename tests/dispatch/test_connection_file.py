"""The file through which the components of an attempt find each other."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from specbatch.dispatch.connection_file import ConnectionFile, Keys, publish, wait_for
from specbatch.errors import RunError


def make_rendezvous(attempt: int = 1) -> ConnectionFile:
    keys = Keys.new()
    return ConnectionFile.new(
        keys,
        run="0123456789abcdef",
        attempt=attempt,
        host="127.0.0.1",
        master_port=1,
        metrics_port=2,
        dispatcher_port=3,
    )


def test_what_is_published_is_read_and_only_its_owner_can_read_it(tmp_path: Path):
    path, rendezvous = tmp_path / "attempts" / "1" / "rendezvous.json", make_rendezvous()
    publish(path, rendezvous)
    assert wait_for(path, 1, 0.0) == rendezvous
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["rendezvous.json"]


def test_no_umask_opens_it_to_others(tmp_path: Path):
    before = os.umask(0)
    try:
        publish(tmp_path / "rendezvous.json", make_rendezvous())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "rendezvous.json").stat().st_mode) == 0o600


def test_what_another_user_wrote_is_not_believed(tmp_path: Path):
    path = tmp_path / "rendezvous.json"
    if os.geteuid() == 0:
        publish(path, make_rendezvous())
        os.chown(path, 65534, -1)
    else:
        path.symlink_to("/etc/passwd")
    with pytest.raises(RunError, match="it is not trusted"):
        wait_for(path, 1, 0.0)


def test_it_is_waited_for(tmp_path: Path):
    path, rendezvous = tmp_path / "rendezvous.json", make_rendezvous()
    timer = threading.Timer(0.3, publish, (path, rendezvous))
    timer.start()
    assert wait_for(path, 1, 10.0) == rendezvous
    timer.join()


def test_waiting_in_vain_says_for_whom(tmp_path: Path):
    with pytest.raises(RunError, match="head of attempt 7"):
        wait_for(tmp_path / "rendezvous.json", 7, 0.0)


def test_another_attempt_is_refused(tmp_path: Path):
    publish(tmp_path / "rendezvous.json", make_rendezvous(attempt=1))
    with pytest.raises(RunError, match=r"belongs to attempt 1, but this is attempt 2"):
        wait_for(tmp_path / "rendezvous.json", 2, 0.0)


@pytest.mark.parametrize("content", ["", "{}", '{"run": 5}', "null"])
def test_what_is_no_rendezvous_is_refused_by_name(tmp_path: Path, content: str):
    path = tmp_path / "rendezvous.json"
    path.write_text(content)
    with pytest.raises(RunError, match=r"rendezvous\.json: not a rendezvous"):
        wait_for(path, 1, 0.0)


def test_keys_differ_every_time():
    assert len({Keys.new() for _ in range(3)}) == 3
