"""Where the ranks meet: torch's elastic agent asks for it at each start of its ranks.

Torch's own rendezvous keep what agents agree on as pickles in a store that listens on the network, where any user of
the node could put another one. A single agent has nobody to agree with: its store is its own memory.
"""

from __future__ import annotations

import socket
import time

from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from specbatch.errors import AttemptError
from specbatch.rundir import RunDir, read_json, write_json
from specbatch.training.place import Place

LOOPBACK = "127.0.0.1"
_WAIT_S, _LOOK_S = 300.0, 0.2


class OneNode(RendezvousHandler):
    """A rendezvous of one agent.

    Args:
        name: of the attempt.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def get_backend(self) -> str:
        return "one-node"

    @property
    def use_agent_store(self) -> bool:
        """No: ranks that are started again would find the addresses of the dead in it."""
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        """A new store for the agent, and a free port for the first rank's."""
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, _free_port(LOOPBACK)))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody else could come."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._name

    def shutdown(self) -> bool:
        return True


class ManyNodes(OneNode):
    """A rendezvous of the agents of several nodes, for one start of their ranks: the first node says in a file of
    the attempt where its first rank will be.

    Args:
        place: which of the nodes this is.

    Raises:
        AttemptError: the first node does not say it in time.
    """

    def __init__(self, paths: RunDir, attempt: int, place: Place) -> None:
        super().__init__(f"attempt-{attempt}")
        self._file, self._place = paths.attempt(attempt) / "first-rank.json", place

    def get_backend(self) -> str:
        return "many-nodes"

    def next_rendezvous(self) -> RendezvousInfo:
        """As `OneNode`, with the first node's address and port."""
        place = self._place
        if place.node == 0:
            write_json(self._file, {"address": place.address, "port": _free_port(place.address)})
        until = time.monotonic() + _WAIT_S
        while (found := read_json(self._file)) is None:
            if time.monotonic() > until:
                raise AttemptError(f"the first training node did not start its ranks within {_WAIT_S:.0f} s")
            time.sleep(_LOOK_S)
        first = RendezvousStoreInfo(found["address"], found["port"])
        return RendezvousInfo(HashStore(), place.node, place.nodes, first)


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
