"""Finds the address at which the other nodes of the job reach this one."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Mapping

import psutil

from specbatch.errors import UserError

LOOPBACK = "127.0.0.1"
_LOCAL_ONLY = re.compile(r"docker|virbr|veth|br-|cni|flannel|lxc|lxd|podman|usb")
"""Interfaces that lead only to containers, virtual machines or the node's management controller."""
SOCKET_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def node_address(interface: str = "", others: Iterable[str] = ()) -> str:
    """Return this node's IPv4 address.

    Args:
        interface: network interface to use. If empty, the address that the node's name resolves to; if others can't use
            that, the one from which the others are reached; else that of the first interface that may lead to them.
        others: names of the job's other nodes.

    Raises:
        UserError: there is no such interface, or it has no address.
    """
    addresses = _addresses()
    if interface:
        if interface not in addresses:
            raise UserError(
                f"slurm.interface: {socket.gethostname()} has no address on {interface}; it has "
                f"{', '.join(addresses) or 'only the loopback'}"
            )
        return addresses[interface]
    usable = outward(addresses)
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = ""
    if named in usable.values():
        return named
    routes = (_source(other) for other in others)
    return next((address for address in routes if address in usable.values()), next(iter(usable.values()), LOOPBACK))


def outward(addresses: Mapping[str, str]) -> dict[str, str]:
    """Return the addresses, by interface, at which another node may reach this one. Pure."""
    return {
        name: address
        for name, address in addresses.items()
        if not _LOCAL_ONLY.match(name)
        and not ipaddress.ip_address(address).is_link_local
        and not ipaddress.ip_address(address).is_loopback
    }


def name_interface(address: str) -> None:
    """Make NCCL and gloo, which torch's ranks communicate through, use the interface of an address, unless the user has
    chosen one in their environment variables."""
    name = next((name for name, its in _addresses().items() if its == address), "")
    for variable in SOCKET_VARIABLES if name else ():
        os.environ.setdefault(variable, name)


def _source(other: str) -> str:
    """Return the address of this node from which another one is reached, without sending; empty if there is no
    route."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((other, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _addresses() -> dict[str, str]:
    """Return the address of each interface that is up, except the loopback."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up and entry.family == socket.AF_INET and not ipaddress.ip_address(entry.address).is_loopback
    }
