"""Bytes and times as people and run directories see them."""

from __future__ import annotations

import pytest

from specbatch.timestamps import seconds_of, timestamp
from specbatch.units import bytes_text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 bytes"), (1536, "1.5 KiB"), (16 << 20, "16.0 MiB"), (3 << 29, "1.50 GiB")]
)
def test_bytes_in_binary_units(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_a_time_is_read_as_it_was_written() -> None:
    assert timestamp(0.25) == "1970-01-01T00:00:00.250+00:00"
    assert seconds_of(timestamp(1_800_000_000.125)) == 1_800_000_000.125
