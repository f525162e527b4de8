"""Messages between the nodes of an engine."""

from __future__ import annotations

import pytest

from specbatch.dispatch.engine_nodes import SILENT_S, EngineNodes
from specbatch.dispatch.messages import Follow, Following, Launch, Lead, Led, Over

FIRST = Launch("a", "10.0.0.1:5000", {"tp_size": 16}, {}, {}, None)
SECOND = Launch("b", "10.0.0.1:5001", {"tp_size": 16}, {}, {}, None)
LATER = SILENT_S + 1


@pytest.fixture
def nodes() -> EngineNodes:
    return EngineNodes()


def lead(nodes: EngineNodes, launch: Launch | None, now: float, over: Over = Over.NOT, start: str = "1") -> Led:
    return nodes.lead(Lead("e", start, 3, launch, over), now)


def follow(nodes: EngineNodes, node: int, launch: str, now: float, why: str = "") -> Following:
    return nodes.follow(Follow("e", node, f"host{node}", launch, why), now)


def test_an_engine_that_is_started_again_counts_on_nobody_who_was_there_before(nodes):
    lead(nodes, None, 0.0)
    follow(nodes, 1, "", 0.0)
    assert lead(nodes, None, 1.0).hosts == ("host1",)
    assert lead(nodes, None, 2.0, start="2").hosts == ()
    follow(nodes, 1, "", 3.0)
    assert lead(nodes, None, 3.0, start="2").hosts == ("host1",)


def test_the_first_node_sees_who_is_there_and_the_others_hear_what_it_launched(nodes):
    assert follow(nodes, 2, "", 0.0) == Following(None, Over.NOT, 0, False)
    lead(nodes, None, 0.5)
    follow(nodes, 2, "", 0.7)
    assert lead(nodes, None, 1.0) == Led(("host2",), "", False)
    follow(nodes, 1, "", 2.0)
    assert lead(nodes, FIRST, 3.0) == Led(("host1", "host2"), "", False)
    assert follow(nodes, 1, "", 3.0).launch == follow(nodes, 2, "", 3.0).launch == FIRST
    assert nodes.follow(Follow("another", 1, "host1", "", ""), 3.0).launch is None


def test_a_part_that_ended_is_a_problem_of_its_own_launch_only(nodes):
    lead(nodes, None, 0.0)
    for node in (1, 2):
        follow(nodes, node, "a", 0.0)
    assert lead(nodes, FIRST, 0.0).problem == ""
    follow(nodes, 2, "a", 1.0, "its process ended")
    assert lead(nodes, FIRST, 1.0) == Led(("host1", "host2"), "its part on host2 ended: its process ended", False)
    assert lead(nodes, SECOND, 2.0).problem == ""
    assert follow(nodes, 2, "a", 2.0, "its process ended").launch == SECOND


def test_a_silent_node_is_lost_and_told_from_one_that_never_came(nodes):
    lead(nodes, None, 0.0)
    follow(nodes, 1, "a", 0.0)
    led = lead(nodes, FIRST, 1.0)
    assert led.gone
    assert "node 3 of 3" in led.problem
    follow(nodes, 2, "a", 1.0)
    follow(nodes, 1, "a", LATER)
    led = lead(nodes, FIRST, LATER + 1)
    assert led.gone
    assert "host2" in led.problem
    assert led.hosts == ("host1",)


def test_the_others_hear_when_the_first_node_leaves_or_is_silent(nodes):
    lead(nodes, FIRST, 0.0)
    assert not follow(nodes, 1, "a", 1.0).silent
    assert follow(nodes, 1, "a", LATER) == Following(None, Over.NOT, 1, True)
    lead(nodes, None, LATER, Over.LEFT)
    assert follow(nodes, 1, "a", LATER) == Following(None, Over.LEFT, 2, False)
