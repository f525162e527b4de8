"""One server of unmodified SGLang as a child process.

The server listens on a free port of the loopback interface, answers nobody who lacks the key that it was started with,
runs in a session of its own under `guard`, and is gone when its owner leaves the context or dies. It writes to a log
file of its own.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from specbatch.errors import RunError
from specbatch.inference.accelerator import accelerator_available

logger = logging.getLogger(__name__)

READY_POLL_S = 0.25
HEALTH_TIMEOUT_S = 30.0
TRIES = 3
"""How often a request is sent whose connection breaks."""
STARTS = 3
"""How often another port is tried when somebody took the one that was free."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
CPU_ARGUMENTS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    # SGLang takes the machine's free memory for its own: neighbours that allocate meanwhile count as weights.
    "mem_fraction_static": 0.9,
    # An engine without work would keep a core busy looking for some.
    "sleep_on_idle": True,
    # Else the key-value pool takes most of the machine's memory.
    "max_total_tokens": 16384,
}


class EngineError(RunError):
    """An engine broke, and may be started again."""


class ServerDied(EngineError):
    """The server's process ended."""


class ServerSilent(EngineError):
    """The server did not answer in time."""


class ConnectionLost(EngineError):
    """A request's connection broke, and the server works: it answers on another one."""


class RequestRefused(Exception):
    """The server answered a request with an error: its status and text."""


class SGLangServer:
    """``python -m sglang.launch_server``, started and ended by the context manager.

    On a machine without accelerator SGLang gets what it needs to run on the CPU; given arguments win.

    Args:
        arguments: SGLang's own, by its names with underscores. True sets a flag; False and None leave one out; a list
            becomes several values, a dict JSON.
        log: file that the server's output is appended to.
        environment: variables besides those of this process, of which those that name proxies are left out.
        threads: CPU threads of a rank; torch's own choice if None.
        start_timeout_s: seconds until the first token must have been computed.
        grace_s: seconds between asking the server to end and killing it. It has nothing to lose.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        log: Path,
        environment: Mapping[str, str] | None = None,
        threads: int | None = None,
        *,
        start_timeout_s: float = 900.0,
        grace_s: float = 1.0,
    ) -> None:
        self.arguments = dict(arguments)
        self.log = log
        self.environment = dict(environment or {})
        self.threads = threads
        self.start_timeout_s = start_timeout_s
        self.grace_s = grace_s
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._local = threading.local()
        # In hexadecimal: from its configuration file SGLang makes options, and takes what begins with - for one.
        self._key = secrets.token_hex(32)
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> SGLangServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and return when it has computed a token.

        Raises:
            ServerDied: with the end of the log, if the process ends first.
            ServerSilent: if it takes longer than ``start_timeout_s``.
        """
        deadline = time.monotonic() + self.start_timeout_s
        for attempt in range(1, STARTS + 1):
            self._spawn()
            try:
                self._wait_ready(deadline)
                return
            except ServerDied:
                self.stop()
                if attempt == STARTS or not self._port_was_taken():
                    raise
                logger.info("another process took the port, trying another url=%s", self.url)
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """End the server and everything that it started; returns when it is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert self._folder is not None
        process.stdin.close()
        process.wait()
        self._folder.cleanup()

    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and self._process.poll() is None

    def healthy(self) -> bool:
        """Whether the server can be reached and computes; takes a second."""
        try:
            self._request("GET", "/health_generate", HEALTH_TIMEOUT_S)
        except (EngineError, RequestRefused):
            return False
        return True

    def generate(self, payload: Mapping[str, Any], timeout_s: float = 600.0, tries: int = TRIES) -> Any:
        """POST to ``/generate``; safe to call from many threads.

        Args:
            payload: as SGLang documents it; a list of prompts gives a list of results.
            timeout_s: seconds without any answer after which the server counts as silent.
            tries: how often it is sent, if its connection breaks and the server is healthy. It may have been computed.

        Returns:
            SGLang's answer: one dict, or a list of them.

        Raises:
            RequestRefused: SGLang answered with an error.
            ConnectionLost: its connection broke, each time.
            ServerDied: the server ended.
            ServerSilent: no answer in time.
        """
        for tried in itertools.count(1):
            try:
                return self._request("POST", "/generate", timeout_s, json=payload).json()
            except ServerDied as error:
                if not self.healthy():
                    raise
                logger.warning("connection lost, the engine is healthy tried=%d of=%d why=%s", tried, tries, error)
                if tried >= tries:
                    raise ConnectionLost(f"a connection to the healthy engine broke: {error}") from error
        raise AssertionError("not reached")

    def get(self, path: str, timeout_s: float = 30.0) -> Any:
        """GET a path that answers in JSON, such as ``/get_server_info``; errors as in `generate`."""
        return self._request("GET", path, timeout_s).json()

    def log_tail(self, lines: int = 30) -> str:
        """The last lines that this start of the server wrote."""
        with self.log.open("rb") as file:
            file.seek(max(self._log_start, self.log.stat().st_size - (1 << 16)))
            text = file.read().decode(errors="replace").replace(self._key, "...")
        return "\n".join(text.splitlines()[-lines:])

    def _request(self, method: str, path: str, timeout_s: float, **options: Any) -> requests.Response:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.trust_env = False
            self._local.session.headers["Authorization"] = f"Bearer {self._key}"
            # SGLang closes one that idles for 5 s, perhaps just when it is used again.
            self._local.session.headers["Connection"] = "close"
        try:
            answer = self._local.session.request(method, self.url + path, timeout=(10.0, timeout_s), **options)
        except requests.Timeout as error:
            raise ServerSilent(f"the engine did not answer for {timeout_s:g} s; its log: {self.log}") from error
        except requests.RequestException as error:
            raise ServerDied(f"the engine broke off: {error}; its log: {self.log}") from error
        if answer.status_code != 200:
            raise RequestRefused(f"HTTP {answer.status_code}: {answer.text[:2000]}")
        return answer

    def _spawn(self) -> None:
        arguments = {**(CPU_ARGUMENTS if not accelerator_available() else {}), **self.arguments}
        port = _free_port()
        arguments |= {"host": "127.0.0.1", "port": port, "skip_server_warmup": True}
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "sglang.launch_server", *self._hidden(), *command_line(arguments)]
        guard = [sys.executable, "-m", "specbatch.inference.guard", str(os.getpid()), str(self.grace_s)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            # SGLang writes all its arguments down, the key among them.
            os.fchmod(output.fileno(), 0o600)
            self._log_start = output.seek(0, os.SEEK_END)
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=self._environment(int(arguments.get("tp_size", 1))),
                start_new_session=True,
            )
        logger.info("engine starting url=%s log=%s pid=%d", self.url, self.log, self._process.pid)

    def _hidden(self) -> list[str]:
        """Options whose values no other user may read in the list of processes: they are in a file of our own."""
        self._folder = tempfile.TemporaryDirectory(prefix="specbatch-")
        path = Path(self._folder.name) / "key.yaml"
        path.write_text(json.dumps({"api-key": self._key}))
        return ["--config", str(path)]

    def _environment(self, ranks: int) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name.lower() not in PROXIES}
        environment |= {"PYTHONUNBUFFERED": "1", "NO_PROXY": "*", "no_proxy": "*"}
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        if not accelerator_available():
            environment |= {"SGLANG_PLATFORM": "specbatch_cpu", "TORCHDYNAMO_DISABLE": "1"}
            # Threads that spin at the end of each operation make it five times slower where cores are shared.
            environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            if ranks > 1:
                environment["SGLANG_CPU_OMP_THREADS_BIND"] = bind_cores(
                    sorted(os.sched_getaffinity(0)), ranks, self.threads
                )
        return environment | self.environment

    def _wait_ready(self, deadline: float) -> None:
        started = time.monotonic()
        while time.monotonic() < deadline:
            if not self.alive():
                raise ServerDied(f"the engine ended while it started; its log {self.log} ends:\n{self.log_tail()}")
            try:
                self._request("GET", "/health_generate", min(30.0, max(1.0, deadline - time.monotonic())))
            except (ServerDied, ServerSilent, RequestRefused):
                time.sleep(READY_POLL_S)
                continue
            logger.info("engine ready url=%s seconds=%.1f", self.url, time.monotonic() - started)
            return
        raise ServerSilent(
            f"the engine was not ready after {self.start_timeout_s:g} s; its log {self.log} ends:\n{self.log_tail()}"
        )

    def _port_was_taken(self) -> bool:
        return "address already in use" in self.log_tail(200).lower()


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """SGLang's arguments as its command line takes them; values keep every byte.

    Raises:
        ValueError: for an empty list, which SGLang has no way to be given.
    """
    words: list[str] = []
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, list | tuple):
            if not value:
                raise ValueError(f"{name}: an empty list")
            words += [flag, *map(str, value)]
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            # Joined by "=", so that a value which begins with a dash is not taken for an option.
            words.append(f"{flag}={text}")
    return words


def bind_cores(cores: list[int], ranks: int, threads: int | None) -> str:
    """Which cores each CPU rank runs on, as ``SGLANG_CPU_OMP_THREADS_BIND`` wants it: ``0-1|2-3``.

    Args:
        cores: those that this process may use, ascending.
        threads: cores a rank; an even share if None. Ranks share cores where there are too few.
    """
    share = threads or max(1, len(cores) // ranks)
    chosen = [[cores[(rank * share + i) % len(cores)] for i in range(min(share, len(cores)))] for rank in range(ranks)]
    return "|".join(",".join(map(str, sorted(rank))) for rank in chosen)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
