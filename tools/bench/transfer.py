#!/usr/bin/env python
"""Measures put and get throughput of the store client, compared with one raw TCP socket on the same wire.

    tools/bench/transfer.py --sizes 1 16 64 --seconds 2

Objects go from this process into a segment of another one and back, as hidden states go from an engine into the memory
of a trainer rank; the raw socket connects two such processes, too, with one acknowledgement per object. The three take
turns, so that other load affects all of them; results are medians, after a warm-up. Also measured: the get of an object
that is already in this process's own segment, as in a trainer, and the checksum that follows it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from specbatch.config import Store
from specbatch.transfer.master import Master
from specbatch.transfer.memory import checksum
from specbatch.transfer.store import StoreClient

MB = 1 << 20
HOST = "127.0.0.1"
ACK = b"k"


@dataclass(frozen=True)
class Address:
    host: str
    master_port: int


def lend(port: int, nbytes: int, store: Store, pipe: Connection) -> None:
    """Run in a process: lend memory until the pipe closes."""
    with contextlib.closing(StoreClient(Address(HOST, port), store, segment_bytes=nbytes)) as client:
        pipe.send(client.segment)
        with contextlib.suppress(EOFError):
            pipe.recv()


def swallow(pipe: Connection) -> None:
    """Run in a process: read objects from a socket into memory, and acknowledge each."""
    with socket.create_server((HOST, 0)) as server:
        pipe.send(server.getsockname()[1])
        connection, _ = server.accept()
        room = memoryview(bytearray(64 * MB))
        with connection:
            while header := connection.recv(8):
                size = int.from_bytes(header, "little")
                got = 0
                while got < size:
                    got += connection.recv_into(room[got % len(room) : len(room)], min(size - got, len(room)))
                connection.sendall(ACK)


@contextlib.contextmanager
def process(target: Callable[..., None], *arguments: object) -> Iterator[object]:
    """Run a process in parallel; yield its first message."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    child = spawn.Process(target=target, args=(*arguments, there), daemon=True)
    child.start()
    there.close()
    try:
        yield here.recv()
    finally:
        here.close()
        child.join(timeout=10)
        child.kill()


@dataclass
class Bench:
    """The measured transfers of one object."""

    client: StoreClient
    raw: socket.socket
    segment: str
    data: np.ndarray
    room: np.ndarray
    keys: int = 0

    def put(self, size: int, segment: str) -> str:
        self.keys += 1
        key = f"bench/{self.keys}"
        self.client.put([key], [self.data.ctypes.data], [size], segment=segment)
        return key

    def get(self, key: str, size: int) -> None:
        problem = self.client.get([key], [self.room.ctypes.data], [size])[0]
        assert problem is None, problem

    def send(self, size: int) -> None:
        self.raw.sendall(size.to_bytes(8, "little"))
        self.raw.sendall(memoryview(self.data)[:size])
        assert self.raw.recv(1) == ACK

    def turn(self, size: int) -> dict[str, float]:
        """Return the seconds of each transfer, done once."""
        seconds: dict[str, float] = {}
        with measured(seconds, "raw"):
            self.send(size)
        with measured(seconds, "put"):
            key = self.put(size, self.segment)
        with measured(seconds, "get"):
            self.get(key, size)
        assert np.array_equal(self.room[:size], self.data[:size])
        own = self.put(size, self.client.segment)
        with measured(seconds, "own"):
            self.get(own, size)
        with measured(seconds, "checksum"):
            checksum(memoryview(self.room)[:size], 7)
        self.client.remove([key, own])
        return seconds

    def run(self, size: int, seconds: float) -> dict[str, float]:
        """Return the median GB/s of each transfer."""
        for _ in range(3):
            self.turn(size)
        until, turns = time.monotonic() + seconds, []
        while time.monotonic() < until or len(turns) < 5:
            turns.append(self.turn(size))
        return {way: size / statistics.median(turn[way] for turn in turns) / 1e9 for way in turns[0]}


@contextlib.contextmanager
def measured(seconds: dict[str, float], way: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    seconds[way] = time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 16, 64], help="MiB")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each size")
    parser.add_argument("--protocol", choices=["tcp", "rdma"], default="tcp")
    parser.add_argument("--devices", default="")
    options = parser.parse_args()
    store = Store(protocol=options.protocol, devices=options.devices)
    largest = max(options.sizes) * MB
    results: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        master = stack.enter_context(Master(HOST, folder / "master.log"))
        segment_bytes = max(4 * largest, 16 * MB)
        segment = stack.enter_context(process(lend, master.rpc_port, segment_bytes, store))
        port = stack.enter_context(process(swallow))
        raw = stack.enter_context(socket.create_connection((HOST, port)))
        client = StoreClient(Address(HOST, master.rpc_port), store, segment_bytes=segment_bytes)
        stack.enter_context(contextlib.closing(client))
        data = np.random.default_rng(0).integers(0, 256, largest, dtype=np.uint8)
        room = np.zeros_like(data)
        client.register(data.ctypes.data, data.nbytes)
        client.register(room.ctypes.data, room.nbytes)
        bench = Bench(client, raw, segment, data, room)
        print("   MiB   raw socket   put          get          own segment   checksum   (GB/s, share of raw)")
        for size in options.sizes:
            speed = bench.run(size * MB, options.seconds)
            share = {way: speed[way] / speed["raw"] for way in ("put", "get")}
            print(
                f"{size:6d}   {speed['raw']:10.2f}   {speed['put']:5.2f} {share['put']:5.0%}"
                f"  {speed['get']:5.2f} {share['get']:5.0%}  {speed['own']:11.2f}   {speed['checksum']:8.2f}"
            )
            results[str(size)] = {f"{way}_gb_per_s": round(value, 3) for way, value in speed.items()}
            results[str(size)] |= {f"{way}_share": round(value, 3) for way, value in share.items()}
    print(json.dumps({"protocol": options.protocol, "mib": results}))


if __name__ == "__main__":
    main()
