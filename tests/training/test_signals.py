"""Signals are handled whatever the main thread does, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.light


WATCHING = """
import sys
from specbatch.training.process.signals import watch
watch(lambda number, sender: print(number.name, sender, flush=True))
print("ready", flush=True)
sys.stdin.read()
"""
LEAVING_A_CHILD = """
import subprocess, sys
child = "from specbatch.parent_death import die_with_parent; die_with_parent(); print('ready', flush=True); input()"
subprocess.run([sys.executable, "-c", child])
"""


def test_a_signal_reaches_the_watcher_with_its_sender_while_the_main_thread_is_blocked() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WATCHING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            process.send_signal(number)
            assert process.stdout.readline() == f"{number.name} {os.getpid()}\n"
        assert process.poll() is None


def test_a_process_ends_with_the_one_that_started_it() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", LEAVING_A_CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    [child] = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.02)
