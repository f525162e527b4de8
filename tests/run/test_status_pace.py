"""The status is written when something changed, and otherwise seldom."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from specbatch.run.status_pace import StatusPace
from specbatch.status_file import EngineStatus, PackCounts, Status, StoreUse

ENGINE = EngineStatus("engine-0-ab", "ready", claims=1, packs=9, last_heard_s=0.1)
STATUS = Status(
    state="running", stage="training", step=3, updated="x", ran_s=1.0, window=PackCounts(1), store=StoreUse(1),
    engines=(ENGINE,),
)  # fmt: skip


def status(**more: Any) -> Status:
    return replace(STATUS, **more)


def written(statuses: list[Status], seconds: float = 1.0) -> list[int]:
    """When those were written of which there is one each so many seconds."""
    pace = StatusPace()
    return [n for n, each in enumerate(statuses) if pace.due(each, 100.0 + n * seconds)]


def test_what_does_not_change_is_written_every_ten_seconds():
    assert written([status(updated=str(n), ran_s=float(n)) for n in range(25)]) == [0, 10, 20]


def test_numbers_that_grow_are_written_every_five_seconds_and_news_after_two():
    assert written([status(step=n) for n in range(12)]) == [0, 5, 10]
    assert written([status(step=n, state="running" if n < 6 else "stopping") for n in range(12)]) == [0, 5, 7]
    broken = status(engines=(replace(ENGINE, state="restarting"),))
    assert written([status(), broken, broken, status(), status()]) == [0, 2, 4]
    assert written([status(why=str(n)) for n in range(30)], 0.3) == [0, 7, 14, 21, 28]
