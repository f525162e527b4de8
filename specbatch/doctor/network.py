"""Checks that the nodes of a job reach each other in both directions, and measures how fast."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from specbatch.doctor.finding import Finding, failed
from specbatch.doctor.site import CheckTask
from specbatch.free_ports import free_ports
from specbatch.rundir import read_json, write_json
from specbatch.slurm.parts import parts_of

SEND_S = 0.5
"""Seconds that bytes are sent in each direction."""
JOIN_S = 120.0
"""Seconds that nodes wait for each other: steps of a job start within seconds, unless their setup takes longer."""
TIMEOUT_S = 10.0
SLOW_BYTES_PER_S = 1e9
"""Speed between nodes with GPUs below which it is probably a management network."""
_BLOCK = bytes(1 << 20)
_TO, _FROM = b"t", b"f"


@contextlib.contextmanager
def listening(place: CheckTask, address: str) -> Iterator[None]:
    """Receive and send bytes at this node's address, which others find in the shared directory."""
    port = free_ports(address, 1)[0]
    with socket.create_server((address, port)) as server:
        server.settimeout(0.2)
        ended = threading.Event()
        thread = threading.Thread(target=_serve, args=(server, ended), name="listener", daemon=True)
        thread.start()
        node = socket.gethostname()
        write_json(_peers(place.root) / f"{place.component}-{place.task:05d}.json", [address, port, node])
        try:
            yield
        finally:
            ended.set()
            thread.join()


def reach(place: CheckTask, join_s: float = JOIN_S) -> Iterator[Finding]:
    """Check that this node reaches one node of each other component.

    Args:
        join_s: seconds to wait for the others.
    """
    for part in parts_of(place.config):
        nodes = part.nodes if place.slurm else 1
        if part.name == place.component:
            continue
        what = f"network to {part.name}"
        peers = _await(place.root, part.name, nodes, join_s)
        if len(peers) < nodes:
            yield failed(
                what, f"{nodes - len(peers)} of {nodes} nodes of {part.name} did not appear within {join_s:.0f} s",
                "all nodes", "their own lines here, or doctor.log, say why",
            )  # fmt: skip
            continue
        address, port, node = peers[place.task % len(peers)]
        yield measure(what, address, port, node, fast=place.gpus_needed > 0 and part.name != "head")


def measure(what: str, address: str, port: int, node: str = "", *, fast: bool = False) -> Finding:
    """Measure bytes per second to another node, and from it.

    Args:
        fast: whether hidden states or gradients take this path.
    """
    expected = "reached in both directions"
    remedy = (
        "set slurm.interface to the network that connects the nodes (`ip -4 addr` lists them); if there is a firewall "
        "between nodes, set slurm.ports to open ports"
    )
    try:
        there, back = _rate(address, port, _TO), _rate(address, port, _FROM)
    except OSError as error:
        return failed(what, f"{node or address} is not reached at {address}:{port}: {error}", expected, remedy)
    found = f"{there / 1e9:.2f} GB/s to {node or address}, {back / 1e9:.2f} GB/s from it ({address})"
    rates = {"network_to": there, "network_from": back}
    if fast and min(there, back) < SLOW_BYTES_PER_S:
        return Finding(what, found, f"{SLOW_BYTES_PER_S / 1e9:.0f} GB/s and more", remedy, "warning", rates)
    return Finding(what, found, expected, rates=rates)


def _rate(address: str, port: int, way: bytes) -> float:
    with socket.create_connection((address, port), timeout=TIMEOUT_S) as connection:
        connection.sendall(way)
        if way == _FROM:
            return _take(connection)
        begun, sent = time.monotonic(), _give(connection)
        connection.shutdown(socket.SHUT_WR)
        if not connection.recv(1):
            raise OSError("the connection was closed")
        return sent / (time.monotonic() - begun)


def _serve(server: socket.socket, ended: threading.Event) -> None:
    while not ended.is_set():
        with contextlib.suppress(TimeoutError):
            connection, _ = server.accept()
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.settimeout(TIMEOUT_S)
        if connection.recv(1) == _FROM:
            _give(connection)
        else:
            _take(connection)
            connection.sendall(b"k")


def _give(connection: socket.socket) -> int:
    """Send for a while; return the number of bytes."""
    sent, until = 0, time.monotonic() + SEND_S
    while time.monotonic() < until:
        connection.sendall(_BLOCK)
        sent += len(_BLOCK)
    return sent


def _take(connection: socket.socket) -> float:
    """Read to the end; return bytes per second.

    Raises:
        OSError: nothing came.
    """
    begun, total, memory = time.monotonic(), 0, bytearray(len(_BLOCK))
    while count := connection.recv_into(memory):
        total += count
    if not total:
        raise OSError("nothing came back")
    return total / max(time.monotonic() - begun, 1e-9)


def _await(root: Path, component: str, nodes: int, join_s: float) -> list[tuple[str, int, str]]:
    """Return address, port and name of those of a component's nodes that have appeared."""
    until = time.monotonic() + join_s
    while True:
        found = [read_json(path) for path in sorted(_peers(root).glob(f"{component}-*.json"))]
        if len(found) >= nodes or time.monotonic() > until:
            return [tuple(peer) for peer in found if peer]
        time.sleep(0.2)


def _peers(root: Path) -> Path:
    return root / "peers"
