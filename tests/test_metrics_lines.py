"""All readers of a metrics file get the same lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from specbatch.errors import UserError
from specbatch.metrics_lines import MetricsLine, MetricsTail, last_step, read_metrics, recent_metrics, whole_lines

READERS = [read_metrics, lambda path: recent_metrics(path, 9), lambda path: MetricsTail(path).read()]


@pytest.mark.parametrize("read", READERS)
def test_half_a_line_is_no_line_yet(tmp_path: Path, read):
    path = tmp_path / "metrics.jsonl"
    assert read(path) == []
    path.write_text('{"step": 1, "loss": 2, "new": [1]}\n{"step": 2, "lo')
    assert read(path) == [MetricsLine(1, loss=2.0)]
    assert (last_step(path), len([*whole_lines(path)])) == (1, 1)
    path.write_text('{"step": 1}')
    assert read(path) == []


@pytest.mark.parametrize("read", READERS)
def test_what_is_not_finite_is_not_known(tmp_path: Path, read):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3, "grad_norm": Infinity, "losses": [NaN, 1.5], "evaluation": {"loss": NaN}}\n')
    assert read(path) == [MetricsLine(3, losses=[None, 1.5], evaluation={"loss": None})]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("line", ["{nonsense}", '{"step": "one"}', '{"loss": 1.0}', '{"step": 1, "tokens": null}'])
def test_a_whole_line_that_makes_no_sense_is_named(tmp_path: Path, read, line: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: a line is damaged: .*: b'\{"):
        read(path)


def test_the_last_lines_are_read_without_the_others(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("{damaged}\n" + "".join(f'{{"step": {step}, "why": "{"x" * 900}"}}\n' for step in range(1, 41)))
    assert [line.step for line in recent_metrics(path, 3)] == [38, 39, 40]


def test_the_tail_tells_each_line_once_and_all_of_them_after_a_rewind(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    for text, steps in (
        ('{"step": 1}\n{"st', [1]),
        ('{"step": 1}\n{"step": 2}\n', [2]),
        ('{"step": 1}\n', [1]),
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', [2, 3]),
        ('{"step": 1}\n{"step": 2, "loss": 1}\n{"step": 3}\n{"step": 4}\n', [1, 2, 3, 4]),
        ("", []),
        ('{"step": 1}\n', [1]),
    ):
        path.write_text(text)
        assert [line.step for line in tail.read()] == steps
