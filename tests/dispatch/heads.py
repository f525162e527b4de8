"""A real server of the dispatcher, and the events that it reported."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from specbatch.dispatch.client import Client
from specbatch.dispatch.connection_file import ConnectionFile, Keys
from specbatch.dispatch.server import Server
from specbatch.plan import Plan
from tests.dispatch.cluster import make_dispatcher, make_plan


@dataclass
class Head:
    """A server and the events that it reported."""

    server: Server
    rendezvous: ConnectionFile
    plan: Plan
    events: list[tuple[str, dict]] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    remove_errors: int = 0
    event_errors: int = 0
    removal: threading.Event = field(default_factory=threading.Event)

    def write_event(self, event: str, /, **facts: object) -> None:
        if self.event_errors:
            self.event_errors -= 1
            raise OSError("the disk is full")
        self.events.append((event, facts))

    def remove_prefix(self, prefix: str) -> None:
        if self.remove_errors:
            self.remove_errors -= 1
            raise OSError("the store sleeps")
        self.removed.append(prefix)
        self.removal.set()


def make_head(keys: Keys | None = None) -> Head:
    plan, keys = make_plan(), keys or Keys.new()
    head: Head
    server = Server(
        make_dispatcher(plan),
        keys,
        "127.0.0.1",
        run="ab",
        attempt=3,
        event=lambda event, /, **facts: head.write_event(event, **facts),
        remove_prefix=lambda prefix: head.remove_prefix(prefix),
    )
    rendezvous = ConnectionFile.new(
        keys,
        run="ab",
        attempt=3,
        host="127.0.0.1",
        dispatcher_port=server.port,
    )
    head = Head(server, rendezvous, plan)
    return head


def join_all(client: Client, segment_bytes: int = 100) -> None:
    for rank in (0, 1):
        client.join(rank, 2, f"s{rank}", segment_bytes, 0)
