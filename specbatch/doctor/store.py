"""Checks that the Mooncake store carries objects between the nodes of a job: the head's master, a trainer's memory, an
engine's rows."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from specbatch.config.rules import Bytes
from specbatch.dispatch.connection_file import ConnectionFile, wait_for
from specbatch.doctor.finding import Finding, failed
from specbatch.doctor.site import CheckTask
from specbatch.doctor.trial import ATTEMPT
from specbatch.rundir import RunDir, read_json, write_json
from specbatch.transfer.store import StoreClient, StoreError, store_of, usable_bytes
from specbatch.units import bytes_text

LENT_BYTES = 8 << 30
"""Most bytes that a training node lends."""
OBJECT_BYTES = 16 << 20
JOIN_S = 120.0


def connection_of(place: CheckTask, join_s: float = JOIN_S) -> ConnectionFile:
    """Return the addresses of the master and the dispatcher.

    Raises:
        RunError: the head did not publish it in time.
    """
    return wait_for(RunDir(place.root).rendezvous(ATTEMPT), ATTEMPT, join_s)


@contextlib.contextmanager
def lending(place: CheckTask, join_s: float = JOIN_S) -> Iterator[Finding]:
    """Lend memory of this training node to the store while others measure. Raises the same as `connection_of`."""
    size = Bytes(min(int(place.config.store.bytes_per_rank), LENT_BYTES))
    begun = time.monotonic()
    client = StoreClient(
        connection_of(place, join_s), store_of(place.config, "training"), segment_bytes=int(size), deadline_s=60.0
    )
    with contextlib.closing(client):
        write_json(place.root / "segments" / f"{place.task:05d}.json", [client.segment, int(size)])
        yield Finding(
            "store's memory", f"{bytes_text(size)} lent in {time.monotonic() - begun:.1f} s", "lent and pinned"
        )


def segment_of(place: CheckTask, join_s: float = JOIN_S) -> tuple[str, int]:
    """Return name and bytes of a training node's memory, which differs between tasks.

    Raises:
        StoreError: no training node lends any.
    """
    until = time.monotonic() + join_s
    while time.monotonic() < until:
        found = sorted((place.root / "segments").glob("*.json"))
        if found and (lent := read_json(found[place.task % len(found)])):
            return lent[0], lent[1]
        time.sleep(0.2)
    raise StoreError(f"no training node lent memory to the store within {join_s:.0f} s: their lines here say why")


def round_trip(place: CheckTask, join_s: float = JOIN_S) -> Finding:
    """Put objects from this node into a trainer's memory, get them back, and compare them byte by byte."""
    import torch

    what, expected = "store", f"objects carried over {place.config.store.protocol} both ways"
    segment, size = segment_of(place, join_s)
    count = max(1, min(4, usable_bytes(size) // (2 * OBJECT_BYTES)))
    each = min(OBJECT_BYTES, usable_bytes(size) // 2)
    connection = connection_of(place, join_s)
    client = StoreClient(connection, store_of(place.config, place.component), deadline_s=60.0)
    with contextlib.closing(client):
        memory = torch.frombuffer(bytearray(os.urandom(each) * (2 * count)), dtype=torch.uint8).clone()
        client.register(memory.data_ptr(), memory.numel())
        sent, back = memory.split(each)[:count], memory.split(each)[count:]
        keys = [f"{connection.run}/doctor/{place.component}/{place.task}/{number}" for number in range(count)]
        sizes = [each] * count
        begun = time.monotonic()
        client.put(keys, [part.data_ptr() for part in sent], sizes, segment=segment, wait_s=30.0)
        put_s = time.monotonic() - begun
        for part in back:
            part.zero_()
        begun = time.monotonic()
        lost = [why for why in client.get(keys, [part.data_ptr() for part in back], sizes) if why]
        get_s = time.monotonic() - begun
        client.remove(keys)
        if lost or not all(map(torch.equal, sent, back)):
            why = lost[0] if lost else "the bytes that came back differ"
            return failed(
                what, f"objects put into {segment}: {why}", expected, "look at the master's log and doctor.log"
            )
    rates = {"store_put": count * each / put_s, "store_get": count * each / get_s}
    found = f"put {rates['store_put'] / 1e9:.2f} GB/s, got {rates['store_get'] / 1e9:.2f} GB/s ({segment})"
    return Finding(what, found, expected, rates=rates)
