"""The address under which this node is reached by the others of its job."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from specbatch.errors import UserError

LOOPBACK = "127.0.0.1"


def node_address(interface: str = "") -> str:
    """This node's IPv4 address.

    Args:
        interface: the network interface whose address it shall be; empty: what the node's name stands for, or, where
            that is the loopback, the address of the first interface that is up and has one.

    Raises:
        UserError: there is no such interface, or it has no address.
    """
    addresses = _addresses()
    if interface:
        if interface not in addresses:
            raise UserError(
                f"slurm.interface: {socket.gethostname()} has no address on {interface}; it has {', '.join(addresses)}"
            )
        return addresses[interface]
    try:
        named = socket.gethostbyname(socket.gethostname())
        if not ipaddress.ip_address(named).is_loopback:
            return named
    except OSError:
        pass
    return next(iter(addresses.values()), LOOPBACK)


def _addresses() -> dict[str, str]:
    """Of each interface that is up, but for the loopback."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up and entry.family == socket.AF_INET and not ipaddress.ip_address(entry.address).is_loopback
    }
