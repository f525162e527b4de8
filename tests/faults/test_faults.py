"""A few dozen faults in one run, of every kind, and what it comes to: the same, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.campaign import Campaign
from tests.faults.kinds import KINDS
from tests.faults.table import table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_a_run_comes_to_the_same_whatever_is_done_to_it(tmp_path: Path, tiny_target: Path) -> None:
    campaign = Campaign(tmp_path, tiny_target, seed=1, steps=200)
    expected = campaign.undisturbed()
    campaign.disturb(len(KINDS) + 8, expected, prompts=2)
    print(table(campaign.tallies))
    assert campaign.tallies.keys() == {kind.name for kind in KINDS}
    assert all(tally.recovered == tally.count for tally in campaign.tallies.values())
