"""A client of the Mooncake store: moves objects between registered memory and the store without an extra copy.

Mooncake's own calls can block for a minute, report success for data that was never written, and fall back to TCP
silently. Here every call has a deadline, failures are distinguished, and stored objects are never evicted.
"""

from __future__ import annotations

import logging
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from specbatch.config import Config, Store
from specbatch.errors import RunError, UserError
from specbatch.transfer.bounded import BoundedCalls, Call
from specbatch.transfer.mooncake import store_module

logger = logging.getLogger(__name__)

SMALLEST_SEGMENT_BYTES = 16 << 20
"""Smallest segment that Mooncake accepts."""
USABLE_FRACTION = 0.85
BATCH_BYTES = 64 << 20
"""Most bytes of one call, so that its deadline applies to a bounded amount."""
LOCAL_BUFFER_BYTES = 16 << 20
"""Buffer for Mooncake's copying calls. They are not used here, but Mooncake requires some."""
PROBE_S = 10.0
SETUP_DEADLINE_S = 60.0
REGISTERED_PER_S = 256 << 20
"""Bytes of memory that RDMA devices pin at least per second, one device after the other."""
CLOSE_DEADLINE_S = 15.0
RETRY_S = 0.02
LONGEST_RETRY_S = 0.5
"""Longest pause between two attempts to put objects for which there was no room."""

NO_ROOM = -200
NOT_THERE = -704
MEANINGS = {
    NO_ROOM: "there is no room",
    -600: "invalid parameter",
    -703: "its put is not finished",
    NOT_THERE: "it is not there",
    -706: "it is being read",
    -707: "its lease ended during the transfer",
    -800: "the transfer failed, its owner is gone",
    -900: "the master cannot be reached",
    -901: "the master does not answer",
}


class StoreError(RunError):
    """A request to the store failed: it is unreachable, or its answer is invalid."""


class StoreTimeout(StoreError):
    """The store did not answer within the deadline. The call keeps running and may still use the memory it was
    given."""


class StoreFull(StoreError):
    """The store had no room for some objects; objects stored before are untouched."""

    def __init__(self, message: str, stored: list[bool]) -> None:
        super().__init__(message)
        self.stored = stored
        """The objects of the put that are stored; the others are not, and may be put again."""


class StoreAddress(Protocol):
    """What a client needs to know about an attempt, as in the connection file."""

    @property
    def host(self) -> str: ...

    @property
    def master_port(self) -> int: ...


def usable_bytes(segment_bytes: int) -> int:
    """Return the bytes of a segment that the plan may fill with objects.

    The rest is lost to fragmentation. Packs of 3 to 40 MB in objects of up to 48 MB, stored by four engines out of
    order and removed step by step, filled segments of 128 MB to 1 GB to 0.95 without a failure; removed in random
    order, a segment full of 1 MB objects failed from 0.75 on. If the estimate is too high, puts wait and the dispatcher
    makes the window smaller.
    """
    return int(segment_bytes * USABLE_FRACTION)


def store_of(config: Config, component: Literal["head", "inference", "training"]) -> Store:
    """Return the store's settings for the nodes of a component, which may have RDMA devices of their own."""
    return replace(config.store, devices=getattr(config.slurm, component).devices or config.store.devices)


class StoreClient:
    """A process's client of the store; thread-safe.

    Args:
        segment_bytes: memory that this process lends to the store, at least 16 MiB; 0 for none.
        deadline_s: longest duration of each call.

    Raises:
        UserError: settings can't work here; with the remedy.
        StoreError: if the store can't be reached.
    """

    def __init__(
        self, address: StoreAddress, config: Store, *, segment_bytes: int = 0, deadline_s: float = 20.0
    ) -> None:
        if 0 < segment_bytes < SMALLEST_SEGMENT_BYTES:
            raise UserError(
                f"store.bytes_per_rank: {segment_bytes} is less than Mooncake accepts; set "
                f"at least {SMALLEST_SEGMENT_BYTES}"
            )
        check_protocol(config, segment_bytes)
        module = store_module()
        self._deadline_s = deadline_s
        # Only RDMA pins memory.
        self._pinned_by = len(config.devices.split(",")) if config.protocol == "rdma" else 0
        self._calls = BoundedCalls("store")
        self._reading: dict[Call, list[tuple[int, int]]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._store = module.MooncakeDistributedStore()
        self._pinned: Callable[[str], Any] = lambda segment: _pinned(module, segment)
        own = own_address(address.host, address.master_port)
        master = f"{address.host}:{address.master_port}"
        code = self._call(
            "setup",
            self._store.setup,
            own,
            "P2PHANDSHAKE",
            segment_bytes,
            LOCAL_BUFFER_BYTES,
            config.protocol,
            config.devices,
            master,
            deadline_s=SETUP_DEADLINE_S + self._pinning_s(segment_bytes),
        )
        if code != 0:
            devices = f", devices {config.devices}" if config.devices else ""
            raise StoreError(
                f"the store at {master} refused this client ({config.protocol}{devices}, own address {own}, "
                f"{segment_bytes} bytes): code {code}; Mooncake's own message is above"
            )
        self.segment: str = self._store.get_hostname() if segment_bytes else ""
        """Name of this process's segment, for the puts of others; empty if it lends no memory."""
        logger.info("store joined master=%s own=%s segment=%s bytes=%d", master, own, self.segment, segment_bytes)

    def register(self, pointer: int, nbytes: int) -> None:
        """Register memory with the store: once, before it is a source of puts or a destination of gets.

        It must stay allocated until `close`: a call that exceeded its deadline may still use it.
        """
        deadline_s = self._deadline_s + self._pinning_s(nbytes)
        code = self._call("register", self._store.register_buffer, pointer, nbytes, deadline_s=deadline_s)
        if code != 0:
            raise StoreError(f"{nbytes} bytes of memory could not be registered: {_meaning(code)}")

    def put(
        self,
        keys: Sequence[str],
        pointers: Sequence[int],
        sizes: Sequence[int],
        *,
        segment: str = "",
        wait_s: float = 0.0,
    ) -> None:
        """Store objects, hard pinned: they stay until they are removed.

        Args:
            keys: never used before (`specbatch.pack_manifest.object_key`): an existing key would keep its old bytes.
            segment: name of the segment for the objects; if empty, full or gone, any segment is used.
            wait_s: seconds to wait for room.

        Raises:
            StoreFull: there is no room for some of them.
            StoreError: anything else; it is unknown which of them are stored. Never put the same keys again.
        """
        if len({*keys}) != len(keys) or min(sizes, default=1) < 1:
            raise ValueError("objects need distinct keys and at least one byte")
        replicate = self._pinned(segment)
        until = time.monotonic() + wait_s
        stored = [False] * len(keys)
        pause_s = RETRY_S
        while True:
            for batch in _batches([i for i, there in enumerate(stored) if not there], sizes):
                codes = self._call(
                    "put",
                    self._store.batch_put_from,
                    [keys[i] for i in batch],
                    [pointers[i] for i in batch],
                    [sizes[i] for i in batch],
                    replicate,
                )
                for i, code in zip(batch, codes, strict=True):
                    if code not in (0, NO_ROOM):
                        raise StoreError(f"object {keys[i]} could not be stored: {_meaning(code)}")
                    stored[i] = code == 0
            if all(stored):
                return
            if time.monotonic() >= until:
                missing = [size for size, there in zip(sizes, stored, strict=True) if not there]
                raise StoreFull(
                    f"no room for {len(missing)} objects of {sum(missing)} bytes after {wait_s:g} s", stored
                )
            time.sleep(min(pause_s, max(until - time.monotonic(), 0.0)))
            pause_s = min(2 * pause_s, LONGEST_RETRY_S)

    def get(self, keys: Sequence[str], pointers: Sequence[int], sizes: Sequence[int]) -> list[str | None]:
        """Copy objects into memory.

        Returns:
            for each object None, or why it is lost: not there, its owner gone, another length, no answer. The bytes are
            not verified here, but in `specbatch.transfer.pack_reader`.
        """
        found: list[str | None] = []
        for batch in _batches(range(len(keys)), sizes):
            found += self._get([keys[i] for i in batch], [pointers[i] for i in batch], [sizes[i] for i in batch])
        return found

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects, even while they are read; missing objects are not an error.

        Raises:
            StoreError: an object could not be removed.
        """
        if not keys:
            return
        codes = self._call("remove", self._store.batch_remove, list(keys), True)
        for key, code in zip(keys, codes, strict=True):
            if code not in (0, NOT_THERE):
                raise StoreError(f"object {key} could not be removed: {_meaning(code)}")

    def remove_prefix(self, prefix: str) -> int:
        """Remove all objects whose keys start with ``prefix``.

        Returns:
            number of removed objects.
        """
        count = self._call("remove", self._store.remove_by_regex, "^" + _quoted(prefix), True)
        if count < 0:
            raise StoreError(f"objects {prefix}* could not be removed: {_meaning(count)}")
        return int(count)

    def close(self) -> None:
        """Leave the store; the objects in this process's segment vanish. Takes about 2 s."""
        if self._closed:
            return
        self._closed = True
        if not self._calls.start(self._store.close).wait(CLOSE_DEADLINE_S):
            logger.warning("store did not close within_s=%.0f", CLOSE_DEADLINE_S)
        self._calls.close()

    def _pinning_s(self, nbytes: int) -> float:
        return self._pinned_by * nbytes / REGISTERED_PER_S

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any, deadline_s: float | None = None) -> Any:
        deadline_s = deadline_s or self._deadline_s
        call = self._calls.start(function, *arguments)
        if not call.wait(deadline_s):
            raise StoreTimeout(f"{what}: the store did not answer within {deadline_s:g} s")
        return call.result()

    def _get(self, keys: list[str], pointers: list[int], sizes: list[int]) -> list[str | None]:
        ranges = [(pointer, pointer + size) for pointer, size in zip(pointers, sizes, strict=True)]
        if not self._memory_is_free(ranges):
            return ["an earlier read into the same memory has not ended"] * len(keys)
        call = self._calls.start(self._store.batch_get_into, keys, pointers, sizes)
        if not call.wait(self._deadline_s):
            with self._lock:
                self._reading[call] = ranges
            return [f"no answer within {self._deadline_s:g} s"] * len(keys)
        return [_problem(code, size) for code, size in zip(call.result(), sizes, strict=True)]

    def _memory_is_free(self, ranges: list[tuple[int, int]]) -> bool:
        """Wait for earlier reads that exceeded their deadline and may still write into this memory."""
        until = time.monotonic() + self._deadline_s
        with self._lock:
            earlier = dict(self._reading)
        for call, taken in earlier.items():
            overlap = any(a < d and c < b for a, b in ranges for c, d in taken)
            if overlap and not call.wait(max(until - time.monotonic(), 0.0)):
                return False
            if call.wait(0):
                with self._lock:
                    self._reading.pop(call, None)
        return True


def own_address(host: str, port: int, timeout_s: float = PROBE_S) -> str:
    """Return the address of this machine on the head's network, at which other machines reach it.

    Args:
        timeout_s: seconds to try.

    Raises:
        StoreError: nothing listens there, which Mooncake itself would report only after 90 s.
    """
    until = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(timeout_s, 0.1)) as probe:
                return str(probe.getsockname()[0])
        except OSError as error:
            if time.monotonic() >= until:
                raise StoreError(f"the store's master at {host}:{port} cannot be reached: {error}") from error
        time.sleep(0.2)


def check_protocol(config: Store, segment_bytes: int) -> None:
    """Refuse settings for which Mooncake would silently fall back to TCP, or fail without a reason."""
    if config.protocol != "rdma":
        return
    devices = [name for name in config.devices.split(",") if name]
    if not devices:
        raise UserError("store.devices: required for store.protocol rdma, for example mlx5_0,mlx5_1")
    there = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    if lacking := [name for name in devices if name not in there]:
        known = ", ".join(there) or "no RDMA devices"
        raise UserError(f"store.devices: {', '.join(lacking)}: this node has {known}; or use store.protocol tcp")
    _check_memlock(segment_bytes + LOCAL_BUFFER_BYTES)


def _check_memlock(pinned: int) -> None:
    """Refuse RDMA if this process may not pin enough memory, which Mooncake would only report as code -1.

    Args:
        pinned: bytes to pin.
    """
    allowed = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if allowed != resource.RLIM_INFINITY and allowed < pinned:
        raise UserError(
            f"store.protocol: rdma pins memory, and a process may pin {allowed} bytes on this node (`ulimit -l`), less "
            f"than the {pinned} of store.bytes_per_rank; have the limit lifted (Slurm: LimitMEMLOCK=infinity of "
            "slurmd, PropagateResourceLimitsExcept=MEMLOCK), or use store.protocol tcp"
        )


def _batches(indices: Iterable[int], sizes: Sequence[int]) -> list[list[int]]:
    """Divide indices of objects, in order, into batches of at most `BATCH_BYTES` or of one object."""
    batches: list[list[int]] = []
    room = 0
    for i in indices:
        if not batches or sizes[i] > room:
            batches.append([])
            room = BATCH_BYTES
        batches[-1].append(i)
        room -= sizes[i]
    return batches


def _pinned(module: Any, segment: str) -> Any:
    config = module.ReplicateConfig()
    config.with_hard_pin = True
    if segment:
        config.preferred_segment = segment
    return config


def _problem(code: int, size: int) -> str | None:
    if code == size:
        return None
    if code >= 0:
        return f"it has {code} bytes instead of {size}"
    if code == -600:
        return f"it does not have {size} bytes"
    return _meaning(code)


def _meaning(code: int) -> str:
    return f"{MEANINGS.get(code, 'Mooncake failed')} (code {code})"


def _quoted(text: str) -> str:
    """Quote a text for Mooncake's regular expressions (ECMAScript), which have fewer escapes than Python's."""
    return re.sub(r"([.^$|()\[\]{}*+?\\])", r"\\\1", text)
