"""The file with the addresses of an attempt's components, and the keys that let them in.

The head writes it into the run directory once everything listens. It contains secrets, so only its owner can read it;
it is written whole or not at all; and a component of another attempt refuses it.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from pathlib import Path
from typing import Literal

import msgspec
import zmq

from specbatch.errors import RunError
from specbatch.rundir import write_whole

POLL_S = 0.2
"""Interval between two checks for the file, which may be on a network file system."""


Work = Literal["packs", "prompts"]


class ConnectionFile(msgspec.Struct, frozen=True):
    """Addresses and keys of one attempt."""

    run: str
    """The run's id, hexadecimal; the first part of every key in the store."""
    attempt: int
    host: str
    """Address of the head."""
    master_port: int
    metrics_port: int
    dispatcher_port: int
    server_public: str
    client_public: str
    client_secret: str
    """CURVE keys, Z85."""
    checksum_seed: int
    """Seed of the checksums in manifests, 64 bits; an object made without it fails its check."""
    work: Work = "packs"
    """What can be claimed. An attempt that answers prompts and then trains has first one, then the other."""

    @classmethod
    def new(
        cls,
        keys: Keys,
        *,
        run: str,
        attempt: int,
        host: str,
        dispatcher_port: int,
        master_port: int = 0,
        metrics_port: int = 0,
        work: Work = "packs",
    ) -> ConnectionFile:
        """Return the addresses with those of the keys that others may have; ports are 0 of what is not there."""
        return cls(
            run=run,
            attempt=attempt,
            host=host,
            master_port=master_port,
            metrics_port=metrics_port,
            dispatcher_port=dispatcher_port,
            server_public=keys.server_public,
            client_public=keys.client_public,
            client_secret=keys.client_secret,
            checksum_seed=keys.checksum_seed,
            work=work,
        )


class Keys(msgspec.Struct, frozen=True):
    """All keys of an attempt. The server's secret key never leaves the head's memory."""

    server_public: str
    server_secret: str
    client_public: str
    client_secret: str
    checksum_seed: int

    @classmethod
    def new(cls) -> Keys:
        """Return new random keys."""
        server, client = zmq.curve_keypair(), zmq.curve_keypair()
        return cls(
            server_public=server[0].decode(),
            server_secret=server[1].decode(),
            client_public=client[0].decode(),
            client_secret=client[1].decode(),
            checksum_seed=secrets.randbits(64),
        )


def publish(path: Path, rendezvous: ConnectionFile) -> None:
    """Write the file atomically, readable for its owner only.

    Raises:
        RunError: the file system lets others read it nevertheless; the file is deleted again.
    """
    write_whole(path, msgspec.json.format(msgspec.json.encode(rendezvous)) + b"\n", mode=0o600)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        path.unlink()
        raise RunError(
            f"{path}: others could read the keys of this attempt, since files here have the mode {mode:o}: "
            "take a run.dir on another file system"
        )


def wait_for(path: Path, attempt: int, timeout_s: float, work: Work | None = None) -> ConnectionFile:
    """Wait for the file and read it.

    Args:
        work: what can be claimed there; a file for other work counts as missing.

    Raises:
        RunError: it does not appear in time, can't be read, or belongs to another attempt or another user, whose file
            could contain any address.
    """
    until = time.monotonic() + timeout_s
    while True:
        found = read(path, attempt)
        if found is not None and work in (None, found.work):
            return found
        if time.monotonic() >= until:
            raise RunError(
                f"{path}: waited {timeout_s:.0f} s for the head of attempt {attempt} to publish its addresses; "
                "see the head's log in the same directory"
            )
        time.sleep(POLL_S)


def read(path: Path, attempt: int) -> ConnectionFile | None:
    """Read the file; return None if there is none. Raises the same as `wait_for`."""
    try:
        with path.open("rb") as file:
            owner, data = os.fstat(file.fileno()).st_uid, file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path}: cannot read the rendezvous of attempt {attempt}: {error}") from error
    if owner != os.geteuid():
        raise RunError(f"{path}: belongs to user {owner}, but this process to {os.geteuid()}: it is not trusted")
    try:
        rendezvous = msgspec.json.decode(data, type=ConnectionFile)
    except msgspec.DecodeError as error:
        raise RunError(f"{path}: not a rendezvous: {error}") from error
    if rendezvous.attempt != attempt:
        raise RunError(f"{path}: belongs to attempt {rendezvous.attempt}, but this is attempt {attempt}")
    return rendezvous
