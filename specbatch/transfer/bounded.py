"""Calls with a deadline, for a library that has none.

A call that exceeds its deadline keeps running in its thread, because threads can't be stopped. Its caller gets an error
and can ask later whether the call has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class Call:
    """One call that runs in another thread."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._function, self._arguments = function, arguments
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Make the call; `result` raises its exception."""
        try:
            self._result = self._function(*self._arguments)
        except BaseException as error:  # raised by `result`
            self._error = error
        finally:
            self._done.set()

    def wait(self, timeout_s: float) -> bool:
        """Return whether the call ended within the time."""
        return self._done.wait(timeout_s)

    def result(self) -> Any:
        """Return the call's result, or raise its exception. Valid only after the call ended."""
        if self._error is not None:
            raise self._error
        return self._result


class BoundedCalls:
    """Runs calls in a pool of threads that never delay the end of the process."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._idle: list[SimpleQueue[Call | None]] = []
        self._lock = threading.Lock()
        self._closed = False

    def start(self, function: Callable[..., Any], *arguments: Any) -> Call:
        """Start a call."""
        call = Call(function, arguments)
        with self._lock:
            work = self._idle.pop() if self._idle else None
        if work is None:
            work = SimpleQueue()
            threading.Thread(target=self._serve, args=(work,), name=self._name, daemon=True).start()
        work.put(call)
        return call

    def close(self) -> None:
        """End idle threads at once, and others after their call."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for work in idle:
            work.put(None)

    def _serve(self, work: SimpleQueue[Call | None]) -> None:
        while (call := work.get()) is not None:
            call.run()
            del call
            with self._lock:
                if self._closed:
                    return
                self._idle.append(work)
