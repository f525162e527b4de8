"""`mooncake_master` under its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specbatch.errors import RunError
from specbatch.transfer.master import Master

pytestmark = pytest.mark.light


def wait_until(condition, timeout_s: float = 10.0) -> bool:
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_starts_on_ports_of_its_own_and_ends_when_left(tmp_path: Path):
    with Master("127.0.0.1", tmp_path / "logs" / "master.log") as first, Master("127.0.0.1", tmp_path / "2") as second:
        ports = {first.rpc_port, first.metrics_port, second.rpc_port, second.metrics_port}
        assert len(ports) == 4
        assert first.healthy()
        assert second.healthy()
        pid = first.pid
    assert not first.alive()
    assert not is_running(pid)
    assert "Master service started" in (tmp_path / "logs" / "master.log").read_text()


def test_one_that_was_killed_is_noticed(tmp_path: Path):
    with Master("127.0.0.1", tmp_path / "log") as master:
        os.kill(master.pid, signal.SIGKILL)
        assert wait_until(lambda: not master.alive())
        assert not master.healthy()


def test_it_does_not_outlive_an_owner_that_was_killed(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from specbatch.transfer.master import Master\n"
        "with Master('127.0.0.1', Path(sys.argv[1])) as master:\n"
        "    print(master.pid, flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pid = int(owner.stdout.readline())
    assert is_running(pid)
    owner.kill()
    owner.communicate()
    assert wait_until(lambda: not is_running(pid))


def test_an_address_of_another_machine_is_an_error(tmp_path: Path):
    with pytest.raises(RunError, match=r"192\.0\.2\.1"):
        Master("192.0.2.1", tmp_path / "log").__enter__()
