"""A few dozen faults in one run, of nearly every kind, and what it comes to: the same, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.campaign import Campaign
from tests.faults.kinds import KINDS
from tests.faults.table import table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LEFT_TO_TOOLS_FAULTS = {
    "kill engine's guard",
    "kill SGLang's server",
    "kill controller",
    "kill command",
    "TERM to rank",
    "TERM to agent",
    "USR2 to head",
}
"""After each of these an engine is loaded anew, which takes longer than all else; others do the same in another way."""


def test_a_run_comes_to_the_same_whatever_is_done_to_it(tmp_path: Path, tiny_target: Path) -> None:
    kinds = [kind for kind in KINDS if kind.name not in LEFT_TO_TOOLS_FAULTS]
    campaign = Campaign(tmp_path, tiny_target, seed=1, steps=200, kinds=kinds)
    expected = campaign.undisturbed()
    campaign.disturb(len(kinds) + 6, expected, prompts=2)
    print(table(campaign.tallies))
    assert campaign.tallies.keys() == {kind.name for kind in kinds}
    assert all(tally.recovered == tally.count for tally in campaign.tallies.values())
