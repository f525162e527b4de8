from __future__ import annotations

import io

import msgspec
from rich.console import Console

from specbatch.metrics_lines import MetricsLine
from specbatch.run.progress import Display, training_text
from specbatch.status_file import PackCounts, Status, StoreUse

STATUS = Status(step=10, steps=40, window=PackCounts(1, 2, 3), store=StoreUse(30, 120))
ROW = MetricsLine(9, seconds=2.0, wait_s=0.5, loss=1.2345, accuracy=[0.5, 0.3], tokens=1000)


def test_the_line_says_all_that_a_person_wants_to_know():
    text = training_text(STATUS, [ROW, msgspec.structs.replace(ROW, accuracy=[0.7, 0.3])])
    assert text == (
        "step 10/40, loss 1.234, accuracy 0.60, 500 tokens/s, waited 25 %, window 1+2+3, store 25 %, 1:00 left"
    )


def test_the_line_makes_sense_before_the_first_step():
    assert training_text(Status(steps=40), []) == "step 0/40"


def shown(tmp_path, *, terminal: bool) -> tuple[str, str]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120, highlight=False)
    with Display(tmp_path / "run.log", 0.0, console) as display:
        display.stage("preparing")
        display.update(5, 10, "conversations 5/10")
        display.stage("training")
        display.training(STATUS, [ROW])
        display.say("a message")
    return screen.getvalue(), (tmp_path / "run.log").read_text()


def test_an_evaluation_is_told_once(tmp_path):
    def row(step: int) -> MetricsLine:
        return MetricsLine(step, evaluation={"loss": 1.0, "accuracy": [0.5], "acceptance_length": 1.5})

    with Display(tmp_path / "run.log", 100.0, Console(file=io.StringIO())) as display:
        display.evaluated([row(4), MetricsLine(5), row(8)], after=4)
        display.evaluated([row(4), row(8), row(12)], after=4)
    told = [line.split("held-out data ")[1] for line in (tmp_path / "run.log").read_text().splitlines()]
    assert told == [f"after step {step}: loss 1.000, accuracy 0.50, acceptance length 1.50" for step in (8, 12)]


def test_the_log_file_has_a_line_an_interval_and_no_bars(tmp_path):
    _, log = shown(tmp_path, terminal=True)
    lines = [line.split(" ", 2)[2] for line in log.splitlines()]
    assert lines[:2] == ["preparing", "preparing: conversations 5/10"]
    assert lines[2].startswith("preparing took ")
    assert "training: step 10/40, loss 1.234" in log
    assert "a message" in log
    assert "━" not in log
    assert "\x1b" not in log


def test_a_terminal_shows_bars_and_other_outputs_the_lines_of_the_log(tmp_path):
    assert "━" in shown(tmp_path, terminal=True)[0]
    screen, log = shown(tmp_path / "other", terminal=False)
    assert screen == log
