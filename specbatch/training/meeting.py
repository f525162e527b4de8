"""Where the ranks of one node meet: torch's elastic agent asks for it at each start of its ranks.

Torch's own rendezvous keep what agents agree on as pickles in a store that listens on the network, where any user of
the node could put another one. A single agent has nobody to agree with: its store is its own memory.
"""

from __future__ import annotations

import socket

from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

LOOPBACK = "127.0.0.1"


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
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = int(probe.getsockname()[1])
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, port))

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
