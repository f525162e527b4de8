"""A stranger at the store: a real Mooncake client that reads the keys and does to the objects what it likes."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path

import msgspec
import numpy as np

from specbatch.dispatch.connection_file import ConnectionFile
from specbatch.transfer.mooncake import store_module

BUFFER_BYTES = 16 << 20


class Stranger:
    """A client of the store; closing it takes 2 s.

    Args:
        rendezvous: of the attempt. Of what stands in it only addresses are used: the store asks for no key.

    Raises:
        ConnectionError: the store is gone.
    """

    def __init__(self, rendezvous: Path) -> None:
        self._at = msgspec.json.decode(rendezvous.read_bytes(), type=ConnectionFile)
        self._store = store_module().MooncakeDistributedStore()
        master = f"{self._at.host}:{self._at.master_port}"
        with socket.create_connection((self._at.host, self._at.master_port), timeout=5):
            # Mooncake would try for 90 s.
            pass
        if code := self._store.setup(self._at.host, "P2PHANDSHAKE", 0, BUFFER_BYTES, "tcp", "", master):
            raise ConnectionError(f"the store at {master} refused a stranger: code {code}")

    def close(self) -> None:
        """Leave."""
        self._store.close()

    def keys(self) -> list[str]:
        """Keys of all objects in the store."""
        connection = http.client.HTTPConnection(self._at.host, self._at.metrics_port, timeout=10)
        try:
            connection.request("GET", "/get_all_keys")
            return connection.getresponse().read().decode().split()
        finally:
            connection.close()

    def remove(self, keys: list[str]) -> int:
        """Remove objects; returns how many were."""
        return sum(code == 0 for code in self._store.batch_remove(keys, True))

    def overwrite(self, keys: list[str]) -> int:
        """Put other bytes of the same length in the place of objects, and fewer in that of every third."""
        done = 0
        for number, key in enumerate(keys):
            size = self._store.get_size(key)
            if size < 2:
                continue
            noise = np.full(size if number % 3 else size // 2, 0x3C, dtype=np.uint8)
            done += self._store.upsert_from(key, noise.ctypes.data, noise.nbytes) == 0
        return done
