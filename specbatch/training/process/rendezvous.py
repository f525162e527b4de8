"""Rendezvous of the ranks, which torch's elastic agent requests at each start of its ranks.

Torch's own rendezvous backends keep the agents' agreement as pickles in a store that listens on the network, where any
user of the node could replace them. Here a single agent keeps it in its own memory, and several use files.
"""

from __future__ import annotations

import time

from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from specbatch.errors import AttemptError
from specbatch.free_ports import free_ports
from specbatch.rundir import RunDir, read_json, write_json
from specbatch.training.process.node import TrainingNode

LOOPBACK = "127.0.0.1"
_WAIT_S, _POLL_S = 300.0, 0.2
_LOOK_S_A_NODE = 2.0
"""Seconds between an agent's polls for requests of others, for each node: so the load of all agents on the file system
does not grow with the number of nodes."""


class OneNode(RendezvousHandler):
    """The rendezvous of a single agent.

    Args:
        name: name of the attempt.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def get_backend(self) -> str:
        return "one-node"

    @property
    def use_agent_store(self) -> bool:
        """Return false: restarted ranks would find the addresses of dead ranks in the agent's store."""
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        """Return a new store for the agent, and a free port for the store of the first rank."""
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, free_ports(LOOPBACK, 1)[0]))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Do nothing: no other agent could join."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._name

    def shutdown(self) -> bool:
        return True


class ManyNodes(OneNode):
    """The rendezvous of the agents of several nodes, for any number of starts of their ranks.

    Starts are numbered. An agent whose ranks died requests the next number with an empty file in the attempt's folder;
    the first node answers with a file that has the address of the first rank of that start. Agents with healthy ranks
    check periodically for requests; usually their ranks notice first, since connections to dead ranks break.

    Args:
        starts: number of earlier starts of this attempt's training; each counts from 0.
        place: position of this node.
    """

    def __init__(self, paths: RunDir, attempt: int, starts: int, place: TrainingNode) -> None:
        super().__init__(f"attempt-{attempt}")
        self._paths, self._attempt, self._place = paths, attempt, place
        self._folder = paths.attempt(attempt) / "training" / str(starts)
        self._look_s, self._looked = _LOOK_S_A_NODE * place.nodes, time.monotonic()
        self.generation = -1

    def get_backend(self) -> str:
        return "many-nodes"

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the same as `OneNode`, with the address and port that the first node gives for the newest start.

        Raises:
            AttemptError: the first node does not give them in time, or another node will not restart its ranks.
        """
        place = self._place
        self._folder.mkdir(parents=True, exist_ok=True)
        wanted = max(self.generation + 1, self._newest())
        (self._folder / f"{wanted}.wanted").touch()
        if place.node == 0:
            port = free_ports(place.address, 1)[0]
            write_json(self._folder / f"{wanted}.json", {"address": place.address, "port": port})
        until = time.monotonic() + _WAIT_S
        while (found := read_json(self._folder / f"{wanted}.json")) is None:
            self._refuse_if_lost()
            if time.monotonic() > until:
                raise AttemptError(f"the first training node did not start its ranks within {_WAIT_S:.0f} s")
            time.sleep(_POLL_S)
            # Ranks of a third node may have died meanwhile.
            wanted = max(wanted, self._newest())
        self.generation, self._looked = wanted, time.monotonic()
        first = RendezvousStoreInfo(found["address"], found["port"])
        return RendezvousInfo(HashStore(), place.node, place.nodes, first)

    def num_nodes_waiting(self) -> int:
        """Return 1 if another node has requested the next start, else 0.

        Raises:
            AttemptError: another node will not restart its ranks.
        """
        if time.monotonic() - self._looked < self._look_s:
            return 0
        self._looked = time.monotonic()
        self._refuse_if_lost()
        return int(self._newest() > self.generation)

    def _newest(self) -> int:
        """Return the newest requested start; -1 if none was requested."""
        return max((int(path.stem) for path in self._folder.glob("*.wanted")), default=-1)

    def _refuse_if_lost(self) -> None:
        for node in range(self._place.nodes):
            record = read_json(self._paths.ended(self._attempt, "training", node))
            if record is not None and record["why"]:
                raise AttemptError(f"training node {node} has ended: {record['why'].splitlines()[0]}")
