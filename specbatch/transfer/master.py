"""Starts, watches and ends `mooncake_master`.

The master knows where each object is; the objects themselves are in the memory that clients lend. It never outlives the
thread that started it. No object is ever evicted: their owners remove them.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from specbatch import parent_death
from specbatch.errors import RunError
from specbatch.free_ports import free_ports
from specbatch.transfer.mooncake import master_binary

logger = logging.getLogger(__name__)

LEASE_MS = 60_000
"""Milliseconds of a read's lease. A longer read fails; on a busy machine half a second was too short for 64 MB. A long
lease delays nothing, because objects are removed by force and never evicted."""
CLIENT_TTL_S = 10
"""Seconds after which the objects of a dead client are gone."""
RELEASE_S = 120
"""Seconds after which the space of an interrupted put is free again; longer than a put to a hung peer can take."""
START_TIMEOUT_S = 30.0
TRIES = 5


class Master:
    """A running ``mooncake_master``, as a context manager.

    It dies with the thread that enters the context, even if that is killed, so enter it in a thread that lives long
    enough.

    Args:
        host: address to listen on; only it is bound.
        log_path: file for the master's own log.

    Raises:
        UserError: when entering: Mooncake is not installed.
        RunError: when entering: the master does not start, or the address is not this machine's.
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
                    logger.info("store master listens host=%s port=%d pid=%d", self.host, self.rpc_port, self.pid)
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
        """Process id of the master; 0 if there is none."""
        return self._process.pid if self._process else 0

    def alive(self) -> bool:
        """Return whether the process runs. A running master is not necessarily healthy: see `healthy`."""
        return self._process is not None and self._process.poll() is None

    def healthy(self, timeout_s: float = 2.0) -> bool:
        """Return whether the master runs and reports that it serves."""
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
        """Start on two free ports. Return false if it ended at once, as it does if another process took a port
        first."""
        self.rpc_port, self.metrics_port = free_ports(self.host, 2)
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
        # The small interpreter in between asks the kernel to be killed with its parent, and then becomes the master:
        # doing that between this process's fork and exec would be unsafe, since it has other threads.
        command = [sys.executable, "-I", "-S", parent_death.__file__, str(os.getpid()), str(binary)]
        command += [f"--{name}={value}" for name, value in flags.items()]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until:
            if not self.alive():
                logger.warning("store master ended at start code=%s log=%s", self._process.returncode, self.log_path)
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
