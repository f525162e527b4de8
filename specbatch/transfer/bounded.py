"""Calls with a deadline, for a library that has none.

A call that is not back in time goes on in its thread: threads cannot be stopped. Its caller gets an error and
can ask later whether it has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class Call:
    """One call in another thread."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._function, self._arguments = function, arguments
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Make the call; what it raises is kept for `result`."""
        try:
            self._result = self._function(*self._arguments)
        except BaseException as error:  # handed to whoever waits for the result
            self._error = error
        finally:
            self._done.set()

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within the time."""
        return self._done.wait(timeout_s)

    def result(self) -> Any:
        """What it returned; raises what it raised. Only after it ended."""
        if self._error is not None:
            raise self._error
        return self._result


class BoundedCalls:
    """Makes calls in threads of its own, which are kept for the next calls and never hold up the process's end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._idle: list[SimpleQueue[Call | None]] = []
        self._lock = threading.Lock()
        self._closed = False

    def start(self, function: Callable[..., Any], *arguments: Any) -> Call:
        """Begin a call."""
        call = Call(function, arguments)
        with self._lock:
            work = self._idle.pop() if self._idle else None
        if work is None:
            work = SimpleQueue()
            threading.Thread(target=self._serve, args=(work,), name=self._name, daemon=True).start()
        work.put(call)
        return call

    def close(self) -> None:
        """Let the idle threads end; those in a call end after it."""
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
