"""What is left of an account."""

from __future__ import annotations

from pathlib import Path

import pytest

from specbatch.slurm import balance, commands
from specbatch.slurm.balance import Balance, attempt_hours, balance_lines, parse_limits
from tests.slurm.test_job import load

RECORDED = (Path(__file__).parents[1] / "recorded" / "slurm-22.05.8" / "assoc_mgr.limits.txt").read_text()


def test_the_limits_of_the_account_itself_are_read_and_none_of_its_users():
    found = parse_limits(RECORDED, "lab")
    assert [(limit.kind, limit.limit_h) for limit in found] == [("node", 1000.0), ("gres/gpu", 1.5)]
    assert parse_limits(RECORDED, "LAB")
    (used, _) = parse_limits(RECORDED.replace("node=60000(0)", "node=60000(90)"), "lab")
    assert (used.used_h, used.left_h) == (1.5, 998.5)
    assert parse_limits(RECORDED, "root") == []
    assert parse_limits("", "lab") == []


def test_more_than_is_left_is_said_with_both_numbers():
    assert Balance("account ml", "cpu", 1000, 12.5).text({}) == "account ml has 987.5 of 1,000.0 CPU-hours left"
    more = "less than the 4.0 of an attempt: Slurm may hold the job, or end it early"
    assert (
        Balance("account ml", "node", 10, 12).text({"node": 4}) == f"account ml has 0.0 of 10.0 node-hours left, {more}"
    )


def test_an_attempt_is_counted_by_nodes_and_gpus_and_a_site_that_says_nothing_costs_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = load(tmp_path, "slurm.time=10:00:00", "slurm.account=ml")
    assert attempt_hours(config) == {"node": 30.0, "gres/gpu": 80.0}
    asked = []

    def says(*words: str, deadline_s: float) -> str:
        asked.append(words)
        if len(asked) > 1:
            raise commands.SlurmError("no", "This function is not permitted", passing=False)
        return RECORDED.replace("Account=lab", "Account=ml")

    monkeypatch.setattr(balance.commands, "scontrol", says)
    assert [line[:10] for line in balance_lines(config)] == ["account ml"] * 2
    assert "accounts=ml" in asked[0]
    assert balance_lines(config) == []
