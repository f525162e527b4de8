#!/usr/bin/env python
"""Measures the packs per second that the dispatcher carries from claim to trained, alone and through its server.

    tools/bench/dispatch.py --packs 40000 --batch 64

Every pack is claimed, reported as stored with its manifest, waited for by its rank, and trained. Through the server,
each engine and each rank is a separate process with the real client, over encrypted loopback sockets; the server's
process has one core if there are two. On a machine with other load, use the figures per second of processor time. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time

import numpy as np

from specbatch.dispatch.client import Client
from specbatch.dispatch.connection_file import ConnectionFile, Keys
from specbatch.dispatch.dispatcher import Dispatcher
from specbatch.dispatch.messages import Begin, Claim, Join, Phase, Stored, Trained, Wait
from specbatch.dispatch.server import Server
from specbatch.pack_manifest import Chunk, Manifest, PackId
from specbatch.plan import Plan

RANKS = 2
SAMPLES_PER_PACK = 4
CHUNKS_PER_SAMPLE = 2
CHUNK_BYTES = 1 << 20


def make_plan(packs: int, packs_per_step: int) -> Plan:
    """Make a plan with packs of equal samples and only full steps."""
    lengths = np.full(packs * SAMPLES_PER_PACK, 512)
    return Plan(lengths, seed=0, epochs=1, tokens_per_pack=512 * SAMPLES_PER_PACK, packs_per_step=packs_per_step)


def make_dispatcher(plan: Plan) -> Dispatcher:
    size = SAMPLES_PER_PACK * CHUNKS_PER_SAMPLE * CHUNK_BYTES
    return Dispatcher(plan, steps=plan.steps, bytes_of=lambda _: size, usable=lambda size: size, heartbeat_s=5.0)


def segment_bytes(plan: Plan) -> int:
    """Return the bytes of a segment with room for four steps."""
    return 4 * plan.packs_per_step * SAMPLES_PER_PACK * CHUNKS_PER_SAMPLE * CHUNK_BYTES // RANKS


def manifest(claim: int, pack: PackId) -> Manifest:
    chunks = tuple(
        Chunk(pack[1] * SAMPLES_PER_PACK + sample, tensor, 0, 512, CHUNK_BYTES, "0123456789abcdef" * 2)
        for sample in range(SAMPLES_PER_PACK)
        for tensor in ("aux", "last")
    )
    return Manifest(claim, pack, chunks)


def alone(plan: Plan, batch: int) -> tuple[float, float]:
    """Return packs per second of the state machine: by time, and by processor time."""
    dispatcher = make_dispatcher(plan)
    packs_of = {step: plan.assign(step, RANKS) for step in range(1, plan.steps + 1)}
    begun, used = time.perf_counter(), time.process_time()
    for rank in range(RANKS):
        dispatcher.handle(Join(rank, RANKS, f"segment-{rank}", segment_bytes(plan), 0), 0.0)
    for step in range(1, plan.steps + 1):
        while dispatcher.handle(Begin(0, step), 0.0) is None:
            granted = dispatcher.handle(Claim("engine", batch), 0.0).granted
            dispatcher.handle(Stored("engine", tuple(manifest(g.claim, g.pack) for g in granted)), 0.0)
        for rank in range(RANKS):
            dispatcher.handle(Begin(rank, step), 0.0)
            found = dispatcher.handle(Wait(rank, tuple(pack.id for pack in packs_of[step][rank])), 0.0)
            assert len(found.stored) == plan.packs_per_step // RANKS
            dispatcher.handle(Trained(rank, step), 0.0)
        dispatcher.take_events()
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    assert dispatcher.phase is Phase.TRAINED
    carried = plan.steps * plan.packs_per_step
    return carried / seconds, carried / used


def engine(name: str, rendezvous: ConnectionFile, batch: int, cores: set[int]) -> None:
    """Run in a process: claim packs and report them as stored."""
    os.sched_setaffinity(0, cores)
    client = Client(rendezvous)
    while (claims := client.claim(name, batch)).phase is Phase.WORK:
        if claims.granted:
            client.stored(name, [manifest(granted.claim, granted.pack) for granted in claims.granted])
    client.close()


def rank(number: int, rendezvous: ConnectionFile, packs: int, packs_per_step: int, cores: set[int]) -> None:
    """Run in a process: take packs as a rank, and report steps as trained at once."""
    os.sched_setaffinity(0, cores)
    client, plan = Client(rendezvous), make_plan(packs, packs_per_step)
    client.join(number, RANKS, f"segment-{number}", segment_bytes(plan), 0)
    for step in range(1, plan.steps + 1):
        wanted = {pack.id for pack in plan.assign(step, RANKS)[number]}
        while wanted:
            wanted -= {found.pack for found in client.wait(number, sorted(wanted)).stored}
        while not client.begin(number, step).go:
            pass
        client.trained(number, step)
    client.close()


def through_the_server(packs: int, packs_per_step: int, batch: int, engines: int) -> tuple[float, float]:
    """Return packs per second, by time and by the server's processor time."""
    plan, keys = make_plan(packs, packs_per_step), Keys.new()
    events: list[str] = []
    server = Server(
        make_dispatcher(plan),
        keys,
        "127.0.0.1",
        run="ab",
        attempt=1,
        event=lambda event, /, **facts: events.append(event),
        remove_prefix=lambda prefix: 0,
    )
    rendezvous = ConnectionFile.new(
        keys,
        run="ab",
        attempt=1,
        host="127.0.0.1",
        dispatcher_port=server.port,
    )
    cores = sorted(os.sched_getaffinity(0))
    others = set(cores[1:]) or set(cores)
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=engine, args=(f"e{i}", rendezvous, batch, others)) for i in range(engines)]
    processes += [spawn.Process(target=rank, args=(i, rendezvous, packs, packs_per_step, others)) for i in range(RANKS)]
    os.sched_setaffinity(0, {cores[0]})
    try:
        with server:
            for process in processes:
                process.start()
            while not server.report().step:
                time.sleep(0.02)
            done, begun, used = server.report().step, time.perf_counter(), time.process_time()
            while server.report().phase is not Phase.TRAINED:
                time.sleep(0.02)
            seconds, used = time.perf_counter() - begun, time.process_time() - used
            for process in processes:
                process.join(timeout=30)
    finally:
        os.sched_setaffinity(0, set(cores))
    carried = (plan.steps - done) * packs_per_step
    return carried / seconds, carried / used


def medians(runs: list[tuple[float, float]]) -> list[float]:
    return [statistics.median(values) for values in zip(*runs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=40_000)
    parser.add_argument("--packs-per-step", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64, help="packs in a claim")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    plan = make_plan(options.packs, options.packs_per_step)
    pure = medians([alone(plan, options.batch) for _ in range(options.repeat)])
    print(f"state machine alone  {pure[0]:8.0f} packs/s, {pure[1]:8.0f} per second of its core")
    served = medians(
        [
            through_the_server(options.packs, options.packs_per_step, options.batch, options.engines)
            for _ in range(options.repeat)
        ]
    )
    print(f"through the server   {served[0]:8.0f} packs/s, {served[1]:8.0f} per second of the server's core")
    print(
        json.dumps(
            {
                "packs": options.packs,
                "batch": options.batch,
                "engines": options.engines,
                "ranks": RANKS,
                "state_machine_packs_per_s": round(pure[0]),
                "state_machine_packs_per_cpu_s": round(pure[1]),
                "server_packs_per_s": round(served[0]),
                "server_packs_per_cpu_s": round(served[1]),
            }
        )
    )


if __name__ == "__main__":
    main()
