"""Engines that span several nodes: what their first node has launched, and the state of the others. Pure.

The first node reports for each start what all nodes run; the others receive it and report the state of their part. No
call waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from specbatch.dispatch.messages import Follow, Following, Launch, Lead, Led, Over

SILENT_S = 20.0
"""Seconds of silence after which a node counts as lost."""


@dataclass(slots=True)
class _Node:
    """The last report of a further node."""

    host: str
    launch: str
    why: str
    heard: float


@dataclass(slots=True)
class _Engine:
    start: str = ""
    launch: Launch | None = None
    over: Over = Over.NOT
    beats: int = 0
    """Reports of the first node so far."""
    heard: float = 0.0
    """Time of the last one."""
    nodes: dict[int, _Node] = field(default_factory=dict)


class EngineNodes:
    """The engines of an attempt that span several nodes, by name."""

    def __init__(self) -> None:
        self._engines: dict[str, _Engine] = {}

    def lead(self, request: Lead, now: float) -> Led:
        """Record what an engine's first node has launched; return the state of the others."""
        engine = self._engines.setdefault(request.engine, _Engine())
        if engine.start != request.start:
            # Earlier reports may be from nodes of the previous engine.
            engine.start, engine.nodes = request.start, {}
        engine.launch, engine.over, engine.heard = request.launch, request.over, now
        engine.beats += 1
        there = {node: known for node, known in engine.nodes.items() if now - known.heard <= SILENT_S}
        hosts = tuple(there[node].host for node in sorted(there))
        if request.launch is None:
            return Led(hosts, "", False)
        for node in range(1, request.nodes):
            if node not in there:
                host = engine.nodes[node].host if node in engine.nodes else f"node {node + 1} of {request.nodes}"
                return Led(hosts, f"nothing has been heard of its part on {host} for {SILENT_S:.0f} s", True)
            if there[node].launch == request.launch.id and there[node].why:
                return Led(hosts, f"its part on {there[node].host} ended: {there[node].why}", False)
        return Led(hosts, "", False)

    def follow(self, request: Follow, now: float) -> Following:
        """Record the state of a further node; return what it should run."""
        engine = self._engines.setdefault(request.engine, _Engine())
        engine.nodes[request.node] = _Node(request.host, request.launch, request.why, now)
        silent = engine.beats > 0 and now - engine.heard > SILENT_S
        return Following(None if silent else engine.launch, engine.over, engine.beats, silent)
