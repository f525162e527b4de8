"""A server that captures: SGLang with the plugin, requests that carry orders, and the plugin's answers."""

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
from specbatch.inference.orders import (
    ORDER_KEY,
    PROBE,
    SETTINGS_VARIABLE,
    Captured,
    NotCaptured,
    Order,
    Result,
    Settings,
    new_order,
)
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
"""So many connections may break between two answers before the engine counts as broken."""
PROBE_TOKENS = 8
PROBE_TIMEOUT_S = 120.0
PLUGIN_TIMEOUT_S = 15.0
"""Between SGLang's answer and the plugin's, which stores nothing of a probe."""


class CapturingServer:
    """An engine that puts hidden states into the store; a context manager.

    Args:
        arguments: SGLang's, without those that the capture itself needs.
        log: file that the server's output is appended to.
        settings: all but ``results`` is taken from here.
        aux_layers: the target's layers whose outputs are ``aux``.
        threads: CPU threads of a rank; torch's own choice if None.
        requests: how many `send` may be under way at once.
        request_timeout_s: seconds after which a request without an answer counts as not captured.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        log: Path,
        settings: Settings,
        *,
        aux_layers: Sequence[int],
        environment: Mapping[str, str] | None = None,
        threads: int | None = None,
        requests: int = 2,
        start_timeout_s: float = 900.0,
        request_timeout_s: float = 3600.0,
    ) -> None:
        self.settings = settings
        self.request_timeout_s = request_timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="specbatch-")
        folder = Path(self._folder.name)
        self._address = f"ipc://{folder / 'results'}"
        settings_path = folder / "capture.json"
        settings_path.write_bytes(msgspec.json.encode(msgspec.structs.replace(settings, results=self._address)))
        self.server = SGLangServer(
            {**arguments, **capture_arguments(aux_layers)},
            log,
            {**(environment or {}), SETTINGS_VARIABLE: str(settings_path)},
            threads,
            start_timeout_s=start_timeout_s,
        )
        self._context = zmq.Context()
        self._results = self._context.socket(zmq.PULL)
        self._failures: queue.SimpleQueue[NotCaptured] = queue.SimpleQueue()
        self._lost = 0
        """Connections since the last answer."""
        self._lost_lock = threading.Lock()
        self._requests = ThreadPoolExecutor(requests, thread_name_prefix="specbatch-request")

    def __enter__(self) -> CapturingServer:
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
        """End the server; requests under way fail."""
        self.server.stop()
        self._requests.shutdown(wait=True, cancel_futures=True)
        self._results.close(linger=0)
        self._context.term()
        with contextlib.suppress(FileNotFoundError):
            self._folder.cleanup()

    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self.server.alive()

    def send(self, orders: Sequence[Order], tokens: Sequence[np.ndarray]) -> Future[None]:
        """Send requests with their orders, all at once; returns before they are answered.

        Args:
            orders: of one claim.
            tokens: what each request holds, int ``[tokens]``, none empty and every id in the target's vocabulary:
                SGLang's scheduler would die of others.

        Returns:
            done when SGLang has answered; what became of the orders is told by `results`.
        """
        return self._requests.submit(self._send, list(orders), [row.tolist() for row in tokens])

    def results(self, timeout_s: float) -> list[Result]:
        """What became of orders, as far as it is known; to be called from one thread.

        Args:
            timeout_s: how long to wait for the first.
        """
        found: list[Result] = []
        wait_ms = round(timeout_s * 1000)
        while self._failures.empty() and self._results.poll(0 if found else wait_ms):
            found.append(msgspec.msgpack.decode(self._results.recv(), type=Result))
        while not self._failures.empty():
            found.append(self._failures.get())
        return found

    def _send(self, orders: list[Order], tokens: list[list[int]]) -> None:
        payload = {
            "rid": [order.request_id for order in orders],
            "input_ids": tokens,
            "sampling_params": [
                {"max_new_tokens": 0, "custom_params": {ORDER_KEY: msgspec.to_builtins(order)}} for order in orders
            ],
        }
        try:
            # Once: what an order's claim stored it stores never again.
            answers = self.server.generate(payload, self.request_timeout_s, tries=1)
        except RequestRefused as error:
            self._failures.put(NotCaptured(orders[0].claim, None, f"SGLang refused it: {error}", Fault.PACK))
        except ConnectionLost as error:
            # The claim is given back, and nothing else happens, unless that goes on.
            sample = orders[0].sample if self._count_lost() <= CONNECTIONS_LOST else None
            self._failures.put(NotCaptured(orders[0].claim, sample, str(error), Fault.OTHER))
        except (ServerDied, ServerSilent) as error:
            self._failures.put(NotCaptured(orders[0].claim, None, str(error), Fault.OTHER))
        else:
            with self._lost_lock:
                self._lost = 0
            for order, answer in zip(orders, answers, strict=True):
                reason = answer["meta_info"]["finish_reason"]
                if reason["type"] != "length":
                    why = f"SGLang ended it: {reason.get('message', reason['type'])}"
                    self._failures.put(NotCaptured(order.claim, order.sample, why, Fault.PACK))

    def _count_lost(self) -> int:
        with self._lost_lock:
            self._lost += 1
            return self._lost

    def _probe(self) -> None:
        """Show that the plugin is there and captures what was asked for.

        Raises:
            EngineError: if it does not.
        """
        tokens = np.arange(PROBE_TOKENS) + 1
        rows = {name: np.arange(PROBE_TOKENS) for name in self.settings.widths}
        answered = self.send([new_order(PROBE, (0, 0), PROBE, "", tokens, rows)], [tokens])
        wait([answered], PROBE_TIMEOUT_S)
        results = self.results(PLUGIN_TIMEOUT_S)
        if results and isinstance(results[0], Captured):
            return
        why = next((result.why for result in results if isinstance(result, NotCaptured)), None)
        why = why or f"the plugin said nothing for {PLUGIN_TIMEOUT_S:g} s"
        raise EngineError(
            f"the engine does not capture hidden states: {why}; its log {self.server.log} ends:\n"
            f"{self.server.log_tail()}"
        )


def capture_arguments(aux_layers: Sequence[int]) -> dict[str, Any]:
    """SGLang's arguments that make it keep the hidden states of every token of a prefill."""
    return {
        "skip_tokenizer_init": True,
        "disable_radix_cache": True,
        "enable_return_aux_hidden_states": True,
        # Names what is captured; no draft is loaded.
        "speculative_algorithm": "EAGLE3",
        "return_aux_hidden_state_layer_ids": list(aux_layers),
    }
