"""Calls with a deadline."""

from __future__ import annotations

import threading

import pytest

from specbatch.transfer.bounded import BoundedCalls


def test_a_call_gives_its_result_or_its_error():
    calls = BoundedCalls("test")
    call = calls.start(divmod, 7, 2)
    assert call.wait(5)
    assert call.result() == (3, 1)
    call = calls.start(divmod, 7, 0)
    assert call.wait(5)
    with pytest.raises(ZeroDivisionError):
        call.result()
    calls.close()


def test_a_call_that_hangs_does_not_hold_up_the_next_ones():
    calls, release = BoundedCalls("test"), threading.Event()
    stuck = calls.start(release.wait)
    assert not stuck.wait(0.05)
    other = calls.start(int, "5")
    assert other.wait(5)
    assert other.result() == 5
    release.set()
    assert stuck.wait(5)
    calls.close()


def test_threads_are_used_again_and_end_when_closed():
    calls, names = BoundedCalls("again"), set()
    for _ in range(20):
        call = calls.start(lambda: names.add(threading.get_ident()))
        assert call.wait(5)
    assert len(names) < 20
    calls.close()
    for thread in [t for t in threading.enumerate() if t.name == "again"]:
        thread.join(timeout=5)
        assert not thread.is_alive()
