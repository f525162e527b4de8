"""One server of unmodified SGLang as a child process.

The server listens on a free port of the loopback interface and answers only requests with the key that it was started
with. It runs in a separate session under `guard`, writes to its own log file, and ends when its owner leaves the
context or dies.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import requests

from specbatch.errors import RunError
from specbatch.free_ports import free_ports, restricted
from specbatch.inference import staging, text_only
from specbatch.inference.accelerator import CPU_PLATFORM, PLATFORM_VARIABLE, accelerator_available
from specbatch.inference.command import bind_cores, command_line
from specbatch.process_log import log_tail

if TYPE_CHECKING:
    from specbatch.inference.nodes import FurtherNodes

logger = logging.getLogger(__name__)

READY_POLL_S = 0.25
HEALTH_TIMEOUT_S = 30.0
TRIES = 3
"""Attempts to send a request whose connection breaks."""
STARTS = 3
"""Attempts to start on another port when the chosen one was taken meanwhile."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
CPU_ARGUMENTS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    # SGLang assumes that all free memory is its own: memory that other processes allocate meanwhile counts as weights.
    "mem_fraction_static": 0.9,
    # Without this, an idle engine keeps a core busy with polling.
    "sleep_on_idle": True,
    # A separate pool for layers with a sliding window must hold a whole window, and `torch_native` does not read it.
    "disable_hybrid_swa_memory": True,
    # Otherwise the key-value pool takes most of the machine's memory.
    "max_total_tokens": 16384,
}


class EngineError(RunError):
    """An engine broke, but may be restarted."""


class ServerDied(EngineError):
    """The server's process ended."""


class ServerSilent(EngineError):
    """The server did not answer in time."""


class ConnectionLost(EngineError):
    """A request's connection broke, but the server works: it answers on another one."""


class RequestRefused(Exception):
    """The server answered a request with an error: its status and text."""


class SGLangServer:
    """``python -m sglang.launch_server``, started and ended by the context manager.

    On a machine without accelerator SGLang gets arguments to run on the CPU; given arguments take precedence.

    Args:
        arguments: SGLang's own, by its names with underscores. True sets a flag; False and None leave one out; a list
            becomes several values, a dict JSON.
        log: file that the server's output is appended to.
        environment: variables in addition to those of this process, from which proxies are removed.
        threads: CPU threads per rank; None for torch's own choice.
        files: contents of files that other users can't read, by the variable that names the file.
        nodes: the other nodes that have a part of it, if any.
        start_timeout_s: seconds until the first token must have been computed.
        grace_s: seconds between asking the server to end and killing it.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        log: Path,
        environment: Mapping[str, str] | None = None,
        threads: int | None = None,
        *,
        files: Mapping[str, bytes] | None = None,
        nodes: FurtherNodes | None = None,
        start_timeout_s: float = 900.0,
        grace_s: float = 1.0,
    ) -> None:
        self.arguments = dict(arguments)
        self.log = log
        self.environment = dict(environment or {})
        self.files, self.nodes = dict(files or {}), nodes
        self.threads = threads
        self.start_timeout_s = start_timeout_s
        self.grace_s = grace_s
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._local = threading.local()
        # Hexadecimal, since SGLang turns its configuration file into options, and a value must not begin with "-".
        self._key = secrets.token_hex(32)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._stopped = threading.Event()

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
            ServerDied: the process ended first; with the end of the log.
            ServerSilent: it took longer than ``start_timeout_s``.
            EngineError: `stop` was called before the process was started.
            UserError, AttemptError: the target can't be copied to this node, for which there is no time limit.
        """
        if "model_path" in self.arguments and not staging.stage(self.arguments["model_path"], self._stopped):
            raise EngineError("the engine was not started: it was asked to end")
        deadline = time.monotonic() + self.start_timeout_s
        for attempt in range(1, STARTS + 1):
            self.begin()
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
        """End the server and everything that it started; return when it is gone on this node."""
        self._stopped.set()
        if self.nodes is not None:
            self.nodes.withdraw()
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert self._folder is not None
        process.stdin.close()
        process.wait()
        self._folder.cleanup()

    def alive(self) -> bool:
        """Return whether the server's process and its parts on other nodes run."""
        return not self.trouble()

    def trouble(self) -> str:
        """Return why the server can't continue; empty if it can."""
        if self.nodes is not None and self.nodes.problem:
            return self.nodes.problem
        return "" if self._process is not None and self._process.poll() is None else "its process ended"

    def healthy(self) -> bool:
        """Return whether the server can be reached and computes; takes a second."""
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
            tries: how often to send it if its connection breaks and the server is healthy. It may have been computed.

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

    def generate_in_steps(self, payload: Mapping[str, Any], timeout_s: float = 600.0) -> list[dict[str, Any]]:
        """POST to ``/generate``, and return SGLang's output after each of its steps, in order.

        Args:
            payload: as for `generate`; for a list of prompts each result has its ``index``.

        Raises:
            RequestRefused, ServerDied, ServerSilent: as in `generate`.
        """
        body = self._request("POST", "/generate", timeout_s, json={**payload, "stream": True}).content.decode()
        told = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
        for result in told:
            if "error" in result:
                raise RequestRefused(str(result["error"]))
        return told

    def generate_timed(self, payload: Mapping[str, Any], timeout_s: float = 3600.0) -> tuple[float, dict[str, Any]]:
        """POST one prompt to ``/generate``; safe to call from many threads.

        Returns:
            seconds until its first token, and SGLang's answer.

        Raises:
            RequestRefused, ServerDied, ServerSilent: as in `generate`.
        """
        started, first_s, last = time.monotonic(), 0.0, b""
        with self._request("POST", "/generate", timeout_s, json={**payload, "stream": True}, stream=True) as answer:
            try:
                for line in answer.iter_lines():
                    if line.startswith(b"data: {"):
                        first_s, last = first_s or time.monotonic() - started, line
            except requests.RequestException as error:
                raise ServerDied(f"the engine broke off: {error}; its log: {self.log}") from error
        result = json.loads(last[6:] or b'{"error": "no answer"}')
        if "error" in result:
            raise RequestRefused(str(result["error"]))
        return first_s, result

    def get(self, path: str, timeout_s: float = 30.0) -> Any:
        """GET a path that answers in JSON, such as ``/get_server_info``; errors as in `generate`."""
        return self._request("GET", path, timeout_s).json()

    def log_tail(self, lines: int = 30) -> str:
        """Return the last lines that this start of the server wrote."""
        return "\n".join(log_tail(self.log, lines, self._log_start)).replace(self._key, "...")

    def _request(self, method: str, path: str, timeout_s: float, **options: Any) -> requests.Response:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.trust_env = False
            self._local.session.headers["Authorization"] = f"Bearer {self._key}"
            # SGLang closes a connection that is idle for 5 s, possibly just when it is used again.
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

    def begin(self) -> None:
        """Start the server's process without waiting for it.

        Raises:
            EngineError: its other nodes are missing.
        """
        # No line per request, which would be hundreds of megabytes a day.
        quiet = {"log_level_http": "warning"}
        arguments = {**quiet, **(CPU_ARGUMENTS if not accelerator_available() else {}), **self.arguments}
        if self.nodes is not None:
            arguments |= self.nodes.launch(arguments, self.environment, self.files, self.threads)
        if "model_path" in arguments:
            arguments["model_path"] = staging.staged(arguments["model_path"])
        port, store_port = free_ports("127.0.0.1", 2)
        if restricted():
            # Port of the store through which the ranks meet.
            arguments.setdefault("nccl_port", store_port)
        arguments |= {"host": "127.0.0.1", "port": port, "skip_server_warmup": True}
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "sglang.launch_server", *self._hidden(), *command_line(arguments)]
        guard = [sys.executable, "-m", "specbatch.inference.guard", str(os.getpid()), str(self.grace_s)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            # SGLang logs all its arguments, including the key.
            os.fchmod(output.fileno(), 0o600)
            self._log_start = output.seek(0, os.SEEK_END)
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=self._environment(int(arguments.get("tp_size", 1)), int(arguments.get("nnodes", 1))),
                start_new_session=True,
            )
        logger.info("engine starting url=%s log=%s pid=%d", self.url, self.log, self._process.pid)

    def _hidden(self) -> list[str]:
        """Return options whose values other users must not see in the process list: they are in a private file."""
        self._folder = tempfile.TemporaryDirectory(prefix="specbatch-")
        for variable, content in self.files.items():
            (Path(self._folder.name) / variable).write_bytes(content)
        path = Path(self._folder.name) / "key.yaml"
        path.write_text(json.dumps({"api-key": self._key}))
        return ["--config", str(path)]

    def _environment(self, ranks: int, nodes: int) -> dict[str, str]:
        assert self._folder is not None
        environment = {name: value for name, value in os.environ.items() if name.lower() not in PROXIES}
        environment |= {"PYTHONUNBUFFERED": "1", "NO_PROXY": "*", "no_proxy": "*"}
        if self.arguments.get("skip_tokenizer_init"):
            environment[text_only.SELECT] = "1"
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        if not accelerator_available():
            environment |= {PLATFORM_VARIABLE: CPU_PLATFORM, "TORCHDYNAMO_DISABLE": "1"}
            # Threads that spin at the end of each operation make it five times slower on shared cores.
            environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            if ranks > 1:
                environment["SGLANG_CPU_OMP_THREADS_BIND"] = bind_cores(
                    sorted(os.sched_getaffinity(0)), ranks // nodes, self.threads
                )
        if nodes > 1:
            # Otherwise it would listen on another address than the chosen interface's, or on any port.
            environment["SGLANG_USE_MESSAGE_QUEUE_BROADCASTER"] = "false"
        files = {variable: str(Path(self._folder.name) / variable) for variable in self.files}
        return environment | self.environment | files

    def _wait_ready(self, deadline: float) -> None:
        started = time.monotonic()
        while time.monotonic() < deadline:
            if not self.alive():
                raise ServerDied(
                    f"the engine ended while it started: {self.trouble()}; its log {self.log} ends:\n{self.log_tail()}"
                )
            try:
                self._request("GET", "/health_generate", min(30.0, max(1.0, deadline - time.monotonic())))
            except (ServerDied, ServerSilent, RequestRefused):
                time.sleep(READY_POLL_S)
                continue
            logger.info("engine ready url=%s seconds=%.1f", self.url, time.monotonic() - started)
            return
        raise ServerSilent(
            f"the engine was not ready after {self.start_timeout_s:.0f} s; if it was still loading, set a larger "
            f"start_timeout_s (inference.start_timeout_s of a run); its log {self.log} ends:\n{self.log_tail()}"
        )

    def _port_was_taken(self) -> bool:
        return "address already in use" in self.log_tail(200).lower()
