"""`mooncake_master`, started, watched and ended by its owner.

It keeps in memory which object lies where; objects themselves lie with the clients that lend memory. It never
outlives the thread that started it, and no object is ever evicted: whoever stored one removes it.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from specbatch.errors import RunError
from specbatch.transfer.mooncake import master_binary

log = logging.getLogger(__name__)

LEASE_MS = 60_000
"""A read that takes longer than its lease fails, and on a busy machine half a second was too short for 64 MB. A lease
holds up nobody: we remove by force, and nothing is evicted."""
CLIENT_TTL_S = 10
"""The objects of a client that died are gone after so long."""
RELEASE_S = 120
"""The space of a put that was cut off is free again after so long; more than a put towards a hung peer takes."""
START_TIMEOUT_S = 30.0
TRIES = 5

_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class Master:
    """A running ``mooncake_master``, as a context manager.

    It dies with the thread that enters, even if that is killed; so enter in a thread that lives as long as it
    is needed.

    Args:
        host: address to listen on; only it is bound.
        log_path: where the master's own log goes.

    Raises:
        UserError: when entering, if Mooncake is not installed.
        RunError: when entering, if the master does not start, or the address is not this machine's.
    """

    def __init__(self, host: str, log_path: Path) -> None:
        self.host = host
        self.log_path = log_path
        self.rpc_port = 0
        self.metrics_port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Master:
        binary = master_binary()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log = self.log_path.open("ab")
        try:
            for _ in range(TRIES):
                if self._start(binary):
                    log.info("store master listens host=%s port=%d pid=%d", self.host, self.rpc_port, self.pid)
                    return self
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.__exit__(None, None, None)
        raise RunError(f"mooncake_master did not start on {self.host} in {TRIES} tries; its log is {self.log_path}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        if self._log is not None:
            self._log.close()
            self._log = None

    @property
    def pid(self) -> int:
        """Of the master's process; 0 if there is none."""
        return self._process.pid if self._process else 0

    def alive(self) -> bool:
        """Whether the process runs. A master that does is not necessarily well: see `healthy`."""
        return self._process is not None and self._process.poll() is None

    def healthy(self, timeout_s: float = 2.0) -> bool:
        """Whether it runs and says that it serves."""
        if not self.alive():
            return False
        connection = http.client.HTTPConnection(self.host, self.metrics_port, timeout=timeout_s)
        try:
            connection.request("GET", "/health")
            return bool(json.loads(connection.getresponse().read()).get("service_ready"))
        except (OSError, http.client.HTTPException, ValueError):
            return False
        finally:
            connection.close()

    def _start(self, binary: Path) -> bool:
        """Start on two free ports; False if it ended at once, as it does when somebody took one meanwhile."""
        self.rpc_port, self.metrics_port = _free_ports(self.host, 2)
        flags = {
            "rpc_address": self.host,
            "rpc_port": self.rpc_port,
            "metrics_host": self.host,
            "metrics_port": self.metrics_port,
            "logtostderr": "true",
            "eviction_ratio": 0,
            "eviction_high_watermark_ratio": 1.0,
            "default_kv_lease_ttl": LEASE_MS,
            "client_ttl": CLIENT_TTL_S,
            "put_start_release_timeout_sec": RELEASE_S,
        }
        # The small interpreter in between asks the kernel to be killed with its parent and then becomes the
        # master: doing that between fork and exec of this process would not be safe beside other threads.
        command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), str(binary)]
        command += [f"--{name}={value}" for name, value in flags.items()]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until:
            if not self.alive():
                log.warning("store master ended at start code=%s log=%s", self._process.returncode, self.log_path)
                return False
            if self.healthy():
                return True
            time.sleep(0.05)
        self._end()
        raise RunError(f"mooncake_master was not ready after {START_TIMEOUT_S:.0f} s; its log is {self.log_path}")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        process.wait()


def _free_ports(host: str, count: int) -> list[int]:
    """Ports on which nobody listens now."""
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            sockets.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            sockets[-1].bind((host, 0))
        return [s.getsockname()[1] for s in sockets]
    except OSError as error:
        raise RunError(f"no port is free on {host}, or it is no address of this machine: {error}") from error
    finally:
        for s in sockets:
            s.close()
