"""The address that a node gives itself is one under which others reach it."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from specbatch.errors import UserError
from specbatch.run import address
from specbatch.run.address import name_interface, node_address, outward


def test_addresses_that_lead_nowhere_are_left_out():
    addresses = {
        "usb0": "169.254.3.1", "eno9": "169.254.3.2", "docker0": "172.17.0.1", "virbr0": "192.168.122.1",
        "br-5f2": "172.18.0.1", "lo": "127.0.0.1", "eno1": "10.1.2.3", "hsn0": "10.253.0.7",
    }  # fmt: skip
    assert outward(addresses) == {"eno1": "10.1.2.3", "hsn0": "10.253.0.7"}


def test_an_interface_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(UserError, match=r"slurm\.interface: .* has no address on hsn9; it has "):
        node_address("hsn9")


def own() -> tuple[str, str]:
    """An interface of this machine, and its address."""
    return next(
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    )


def test_where_its_name_does_not_help_the_address_is_the_one_from_which_others_are_reached(monkeypatch):
    name, other = own()
    monkeypatch.setattr(address, "_addresses", lambda: {"eno1": "10.99.0.7", name: other})
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert node_address(others=["no-such-node.invalid", other]) == other
    assert node_address() == "10.99.0.7"


def test_torch_s_ranks_use_the_interface_of_the_address_unless_told_otherwise(monkeypatch):
    name, its = own()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    name_interface(its)
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == (name, "ib0")
    assert node_address(name) == its
    name_interface("192.0.2.1")
