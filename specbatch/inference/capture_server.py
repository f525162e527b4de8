"""A capturing server: SGLang with the plugin; sends capture requests, and receives the plugin's answers."""

from __future__ import annotations

import contextlib
import logging
import queue
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import zmq

from specbatch.dispatch.messages import Fault
from specbatch.drafts.sglang import CAPTURE_ALGORITHM
from specbatch.errors import RunError
from specbatch.inference.capture_request import (
    CAPTURE_REQUEST_KEY,
    HOOKED,
    PLAIN,
    PROBE,
    SETTINGS_VARIABLE,
    Captured,
    CaptureRequest,
    CaptureSettings,
    NotCaptured,
    Result,
    new_capture_request,
)
from specbatch.inference.nodes import FurtherNodes
from specbatch.inference.server import (
    ConnectionLost,
    EngineError,
    RequestRefused,
    ServerDied,
    ServerSilent,
    SGLangServer,
)

logger = logging.getLogger(__name__)

CONNECTIONS_LOST = 3
"""Broken connections between two answers after which the engine counts as broken."""
PROBE_TOKENS = 8
PROBE_TIMEOUT_S = 120.0
PLUGIN_TIMEOUT_S = 15.0
"""Most seconds between SGLang's answer to a probe and the plugin's, which stores nothing."""


class ContractBroken(RunError):
    """The engine does not capture what the contract names, so a restart would not help."""


class CaptureServer:
    """An engine that puts hidden states into the store; a context manager.

    Args:
        arguments: SGLang's, without those that the capture itself needs.
        log: file that the server's output is appended to.
        settings: settings of the plugin; ``results`` is replaced.
        layer_ids: ``settings.layers`` as SGLang's class for the target counts them (`specbatch.drafts.sglang`).
        threads: CPU threads per rank; None for torch's own choice.
        nodes: the other nodes that have a part of it, if any.
        requests: number of `send` calls that may be in progress at once.
        request_timeout_s: seconds after which a request without an answer counts as not captured.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        log: Path,
        settings: CaptureSettings,
        *,
        layer_ids: Sequence[int],
        environment: Mapping[str, str] | None = None,
        threads: int | None = None,
        nodes: FurtherNodes | None = None,
        requests: int = 2,
        start_timeout_s: float = 900.0,
        request_timeout_s: float = 3600.0,
    ) -> None:
        self.settings = settings
        self.request_timeout_s = request_timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="specbatch-")
        self._address = f"ipc://{Path(self._folder.name) / 'results'}"
        plugin = msgspec.json.encode(msgspec.structs.replace(settings, results=self._address))
        self.server = SGLangServer(
            {**arguments, **capture_arguments(layer_ids)},
            log,
            environment,
            threads,
            files={SETTINGS_VARIABLE: plugin},
            nodes=nodes,
            start_timeout_s=start_timeout_s,
        )
        self._context = zmq.Context()
        self._results = self._context.socket(zmq.PULL)
        self._failures: queue.SimpleQueue[NotCaptured] = queue.SimpleQueue()
        self._lost = 0
        """Broken connections since the last answer."""
        self._lost_lock = threading.Lock()
        self._requests = ThreadPoolExecutor(requests, thread_name_prefix="specbatch-request")

    def __enter__(self) -> CaptureServer:
        self._results.bind(self._address)
        try:
            self.server.start()
            self._probe()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server; requests in progress fail."""
        self.server.stop()
        self._requests.shutdown(wait=True, cancel_futures=True)
        self._results.close(linger=0)
        self._context.term()
        with contextlib.suppress(FileNotFoundError):
            self._folder.cleanup()

    def trouble(self) -> str:
        """Return why the server can't continue; empty if it can."""
        return self.server.trouble()

    def send(
        self, captures: Sequence[CaptureRequest], tokens: Sequence[np.ndarray], images: Sequence[list[str]] = ()
    ) -> Future[None]:
        """Send all capture requests of a claim; returns before they are answered.

        Args:
            captures: the capture requests of one claim.
            tokens: token ids of each request, int ``[tokens]``, none empty and every id in the target's vocabulary:
                others would kill SGLang's scheduler. One token stands for each image.
            images: images of each request, as data URLs; may be left out if there are none.

        Returns:
            a future that is done when SGLang has answered; `results` returns the outcomes.
        """
        return self._requests.submit(self._send, list(captures), [row.tolist() for row in tokens], list(images))

    def results(self, timeout_s: float) -> list[Result]:
        """Return the outcomes of capture requests that are known by now; must be called from one thread only.

        Args:
            timeout_s: seconds to wait for the first.
        """
        found: list[Result] = []
        wait_ms = round(timeout_s * 1000)
        while self._failures.empty() and self._results.poll(0 if found else wait_ms):
            found.append(msgspec.msgpack.decode(self._results.recv(), type=Result))
        while not self._failures.empty():
            found.append(self._failures.get())
        return found

    def _send(self, captures: list[CaptureRequest], tokens: list[list[int]], images: list[list[str]]) -> None:
        payload: dict[str, Any] = {
            "rid": [capture.request_id for capture in captures],
            "input_ids": tokens,
            "sampling_params": [
                {"max_new_tokens": 0, "custom_params": {CAPTURE_REQUEST_KEY: msgspec.to_builtins(capture)}}
                for capture in captures
            ],
        }
        if any(images):
            payload["image_data"] = images
        try:
            # Not retried: a claim never stores the same objects twice.
            answers = self.server.generate(payload, self.request_timeout_s, tries=1)
        except RequestRefused as error:
            self._failures.put(NotCaptured(captures[0].claim, None, f"SGLang rejected it: {error}", Fault.PACK))
        except ConnectionLost as error:
            # Only the claim is given back, unless this repeats.
            sample = captures[0].sample if self._count_lost() <= CONNECTIONS_LOST else None
            self._failures.put(NotCaptured(captures[0].claim, sample, str(error), Fault.OTHER))
        except (ServerDied, ServerSilent) as error:
            self._failures.put(NotCaptured(captures[0].claim, None, str(error), Fault.OTHER))
        else:
            with self._lost_lock:
                self._lost = 0
            for capture, answer in zip(captures, answers, strict=True):
                reason = answer["meta_info"]["finish_reason"]
                if reason["type"] != "length":
                    why = f"SGLang ended it: {reason.get('message', reason['type'])}"
                    self._failures.put(NotCaptured(capture.claim, capture.sample, why, Fault.PACK))

    def _count_lost(self) -> int:
        with self._lost_lock:
            self._lost += 1
            return self._lost

    def _probe(self) -> None:
        """Have the plugin verify that it is loaded and captures what the contract names (`contract_probe`).

        Raises:
            EngineError: the plugin gives no answer.
            ContractBroken: it captures something else.
        """
        tokens = np.arange(PROBE_TOKENS) + 1
        rows = {name: np.arange(PROBE_TOKENS) for name in self.settings.widths}
        for sample in (HOOKED, PLAIN):
            answered = self.send([new_capture_request(PROBE, (0, 0), sample, "", tokens, rows)], [tokens])
            wait([answered], PROBE_TIMEOUT_S)
            result = next(iter(self.results(PLUGIN_TIMEOUT_S)), None)
            if isinstance(result, Captured):
                continue
            tail = f"; its log {self.server.log} ends:\n{self.server.log_tail()}"
            if result is not None and result.sample is not None and result.fault is Fault.PACK:
                raise ContractBroken(f"the engine's hidden states can't be trained on: {result.why}{tail}")
            why = f"the plugin did not answer for {PLUGIN_TIMEOUT_S:g} s" if result is None else result.why
            raise EngineError(f"the engine does not capture hidden states: {why}{tail}")


def capture_arguments(layer_ids: Sequence[int]) -> dict[str, Any]:
    """Return SGLang's arguments that make it keep the hidden states of every token of a prefill."""
    return {
        "skip_tokenizer_init": True,
        "disable_radix_cache": True,
        "enable_return_aux_hidden_states": True,
        "speculative_algorithm": CAPTURE_ALGORITHM,
        "return_aux_hidden_state_layer_ids": list(layer_ids),
    }
