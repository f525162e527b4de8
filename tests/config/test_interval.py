import pytest

from specbatch.config.rules import Interval


@pytest.mark.parametrize(
    ("text", "steps", "seconds"),
    [("100", 100, None), ("1_000", 1000, None), ("90s", None, 90.0), ("10min", None, 600.0), ("1.5h", None, 5400.0)],
)
def test_an_interval_is_steps_or_a_time(text, steps, seconds):
    interval = Interval.parse(text)
    assert (interval.steps, interval.seconds, str(interval)) == (steps, seconds, text)


def test_auto_is_neither():
    assert (Interval.parse("auto").steps, Interval.parse("auto").seconds) == (None, None)


@pytest.mark.parametrize("text", ["0", "0min", "-1", "10 minutes", "1d", "", "often", "1.5"])
def test_anything_else_is_none(text):
    with pytest.raises(ValueError, match="is not an interval"):
        Interval.parse(text)
