"""A few dozen faults in one run, of many kinds, and what it comes to: the same, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.campaign import Campaign
from tests.faults.kinds import KINDS
from tests.faults.table import table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KINDS_OF_CI = {
    "clock jumps",
    "cut engine's connections",
    "cut head's connections",
    "cut master's connections",
    "cut rank's connections",
    "kill rank",
    "overwrite objects",
    "remove objects",
    "stop agent, short",
    "stop engine, short",
    "stop head, short",
    "stop master, short",
    "stop rank, short",
    "stop scheduler, short",
}
"""The others, after most of which an engine is loaded anew, are left to `tools/faults`."""


def test_a_run_comes_to_the_same_whatever_is_done_to_it(tmp_path: Path, tiny_target: Path) -> None:
    kinds = [kind for kind in KINDS if kind.name in KINDS_OF_CI]
    campaign = Campaign(tmp_path, tiny_target, seed=4, steps=120, kinds=kinds)
    expected = campaign.undisturbed()
    campaign.disturb(len(kinds) + 10, expected)
    print(table(campaign.tallies))
    assert campaign.tallies.keys() == {kind.name for kind in kinds}
    assert all(tally.recovered == tally.count for tally in campaign.tallies.values())
