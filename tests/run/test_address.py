"""The address that a node gives itself is one under which others reach it."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from specbatch.errors import UserError
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


def test_torch_s_ranks_use_the_interface_of_the_address_unless_told_otherwise(monkeypatch):
    name, address = next(
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    )
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    name_interface(address)
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == (name, "ib0")
    assert node_address(name) == address
    name_interface("192.0.2.1")
