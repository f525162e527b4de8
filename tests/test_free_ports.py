"""Free ports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from specbatch.errors import RunError, UserError
from specbatch.free_ports import free_ports, port_range


def test_ports_differ() -> None:
    assert len(set(free_ports("127.0.0.1", 3))) == 3


def test_an_address_of_another_machine_has_none() -> None:
    with pytest.raises(RunError, match=r"no port is free on 192\.0\.2\.1"):
        free_ports("192.0.2.1", 1)


def test_ports_of_a_range_are_taken_until_none_is_left() -> None:
    code = """
import os, socket
from specbatch.errors import RunError
from specbatch.free_ports import free_ports, use_ports
use_ports("21000-21099")
there = free_ports("127.0.0.1", 20)
assert len(set(there)) == 20 and all(21000 <= port <= 21099 for port in there), there
assert (os.environ["MC_MIN_RPC_PORT"], os.environ["MC_MAX_RPC_PORT"]) == ("21000", "21099")
try:
    free_ports("127.0.0.1", 101)
except RunError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no port is free on 127.0.0.1" in ran.stdout


@pytest.mark.parametrize("text", ["20000", "20000-20010", "1-2000", "65500-66000", "b-c", "30000-20000"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"slurm\.ports: .* write it as 20000-20999"):
        port_range(text)
    assert port_range("") is None
