"""Where the components of an attempt find each other, and the keys that let them in.

The head writes one small file into the run directory once everything listens. It holds secrets, so only its
owner can read it; it is written whole or not at all; and a component of another attempt refuses it.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from pathlib import Path

import msgspec
import zmq

from specbatch.errors import RunError
from specbatch.rundir import write_whole

POLL_S = 0.2
"""Between two looks for the file; it may lie on a network file system."""


class Rendezvous(msgspec.Struct, frozen=True):
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
    """Of the checksums in manifests, 64 bits; an object that nobody of this attempt wrote can't have it right."""


class Keys(msgspec.Struct, frozen=True):
    """All keys of an attempt; the server's secret one never leaves the head's memory."""

    server_public: str
    server_secret: str
    client_public: str
    client_secret: str
    checksum_seed: int

    @classmethod
    def new(cls) -> Keys:
        """Fresh random keys."""
        server, client = zmq.curve_keypair(), zmq.curve_keypair()
        return cls(
            server_public=server[0].decode(),
            server_secret=server[1].decode(),
            client_public=client[0].decode(),
            client_secret=client[1].decode(),
            checksum_seed=secrets.randbits(64),
        )


def publish(path: Path, rendezvous: Rendezvous) -> None:
    """Write the file, whole, readable for its owner only.

    Raises:
        RunError: the file system lets others read it all the same; the file is deleted again.
    """
    write_whole(path, msgspec.json.format(msgspec.json.encode(rendezvous)) + b"\n", mode=0o600)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        path.unlink()
        raise RunError(
            f"{path}: others could read the keys of this attempt, since files here have the mode {mode:o}: "
            "take a run.dir on another file system"
        )


def wait_for(path: Path, attempt: int, timeout_s: float) -> Rendezvous:
    """Read the file as soon as it is there.

    Raises:
        RunError: if it is not there in time, is not readable, belongs to another attempt, or to another user, whose
            word is not taken for where to connect.
    """
    until = time.monotonic() + timeout_s
    while True:
        try:
            with path.open("rb") as file:
                owner, data = os.fstat(file.fileno()).st_uid, file.read()
            break
        except FileNotFoundError:
            pass
        except OSError as error:
            raise RunError(f"{path}: cannot read the rendezvous of attempt {attempt}: {error}") from error
        if time.monotonic() >= until:
            raise RunError(
                f"{path}: waited {timeout_s:.0f} s for the head of attempt {attempt} to publish its addresses; "
                "see the head's log in the same directory"
            )
        time.sleep(POLL_S)
    if owner != os.geteuid():
        raise RunError(f"{path}: is of the user {owner}, and this process of {os.geteuid()}: it is not believed")
    try:
        rendezvous = msgspec.json.decode(data, type=Rendezvous)
    except msgspec.DecodeError as error:
        raise RunError(f"{path}: not a rendezvous: {error}") from error
    if rendezvous.attempt != attempt:
        raise RunError(f"{path}: is of attempt {rendezvous.attempt}, and this is attempt {attempt}")
    return rendezvous
