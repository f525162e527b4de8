#!/usr/bin/env python3
"""Measures the cost of a snapshot: MB/s compared with a plain write + fsync of the same bytes, how long training waits,
and its size compared with the parameters.

    tools/bench/snapshot.py [--megabytes 512] [--rounds 9] [--folder DIR]

In each round every writer takes a turn, in another order, into an empty folder, after earlier writes are on disk. The
result is the median over the rounds, and for the share the median of the rounds' shares. The folder determines the
measured disk. `plain, early` is the plain write that starts writing to the disk after each 8 MiB, as a snapshot does:
the difference to it is the cost of HDF5, checksums and torch's planning.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from specbatch.snapshot.durable_file import DurableFile
from specbatch.snapshot.reading import read_tensors
from specbatch.snapshot.storage import HDF5Writer

State = dict[str, torch.Tensor]


def state_of(megabytes: int) -> State:
    """Return a draft's weights and both optimizer moments, float32, in matrices of 16 MB."""
    matrices = max(1, megabytes // 3 // 16)
    return {f"{part}.{i}": torch.randn(1024, 4096) for part in ("w", "exp_avg", "exp_avg_sq") for i in range(matrices)}


def plain(folder: Path, state: State) -> None:
    """Write the same bytes into one file, and wait for the disk."""
    with (folder / "plain").open("wb", buffering=0) as file:
        for tensor in state.values():
            view = memoryview(tensor.numpy()).cast("B")
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())


def early(folder: Path, state: State) -> None:
    """Do the same, but start writing to the disk early."""
    with DurableFile(folder / "early") as disk:
        for tensor in state.values():
            disk.write(memoryview(tensor.numpy()))


def snapshot(folder: Path, state: State) -> None:
    dcp.save(state, storage_writer=HDF5Writer(folder / "step-1", step=1))


def torchs(folder: Path, state: State) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "torch"))


WRITERS: dict[str, Callable[[Path, State], None]] = {
    "plain": plain,
    "early": early,
    "snapshot": snapshot,
    "torch": torchs,
}
NAMES = {
    "plain": "plain write + fsync",
    "early": "plain, early",
    "snapshot": "snapshot",
    "torch": "torch FileSystemWriter",
}


def cost(write: Callable[[Path, State], None], parent: Path, state: State) -> tuple[float, float]:
    """Return seconds, and seconds of processor time, of one write into an empty folder."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    os.sync()
    try:
        began, worked = time.perf_counter(), time.process_time()
        write(folder, state)
        return time.perf_counter() - began, time.process_time() - worked
    finally:
        shutil.rmtree(folder)


def stalls(parent: Path, state: State, repeats: int) -> dict[str, float]:
    """Return the seconds that an asynchronous save blocks its caller, that one plain copy of the same bytes takes, and
    of the longest pause of a working thread meanwhile."""
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )
    copies = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    blocked, pauses, copying = [], [], []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        for name, tensor in state.items():
            copies[name].copy_(tensor)
        copying.append(time.perf_counter() - began)
        folder = Path(tempfile.mkdtemp(dir=parent))
        began = time.perf_counter()
        writing = dcp.async_save(state, storage_writer=HDF5Writer(folder / "step-1", step=1), async_stager=stager)
        last = time.perf_counter()
        blocked.append(last - began)
        pause = 0.0
        while not writing.done():
            sum(range(2000))
            now = time.perf_counter()
            pause, last = max(pause, now - last), now
        writing.result()
        pauses.append(pause)
        shutil.rmtree(folder)
    stager.close()
    # The first save also makes the buffers that later ones are copied into.
    return {
        "first_stall_s": blocked[0],
        "stall_s": statistics.median(blocked[1:]),
        "copy_s": statistics.median(copying[1:]),
        "longest_pause_s": statistics.median(pauses[1:]),
    }


def size_of(parent: Path, state: State) -> dict[str, float]:
    """Return the bytes on disk, including the manifest, and how fast they are read with all checksums."""
    snapshot(parent, state)
    stored = parent / "step-1"
    began = time.perf_counter()
    read_tensors(stored)
    reading = time.perf_counter() - began
    written = sum(path.stat().st_size for path in stored.iterdir())
    shutil.rmtree(stored)
    size = sum(tensor.nbytes for tensor in state.values())
    parameters = sum(tensor.numel() for name, tensor in state.items() if name.startswith("w."))
    return {
        "bytes": size,
        "parameters": parameters,
        "stored_bytes": written,
        "bytes_per_parameter": written / parameters,
        "overhead": written / size - 1,
        "checked_read_mb_s": size / 1e6 / reading,
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure(parent: Path, megabytes: int, rounds: int) -> dict[str, object]:
    state = state_of(megabytes)
    order, draw = list(WRITERS), random.Random(0)
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in WRITERS}
    for number in range(rounds + 1):
        draw.shuffle(order)
        for kind in order:
            took = cost(WRITERS[kind], parent, state)
            # The first round is a warm-up.
            if number:
                taken[kind].append(took)
    figures: dict[str, object] = {"rounds": rounds, **size_of(parent, state), **stalls(parent, state, rounds)}
    size = sum(tensor.nbytes for tensor in state.values())
    for kind, times in taken.items():
        figures[f"{kind}_mb_s"] = spread([size / 1e6 / wall for wall, _ in times])
        figures[f"{kind}_processor_s"] = statistics.median(worked for _, worked in times)
    for base in ("plain", "early"):
        shares = [ours / theirs for (theirs, _), (ours, _) in zip(taken["snapshot"], taken[base], strict=True)]
        figures[f"share_of_{base}"] = spread(shares)
    return figures


def show(figures: dict, folder: Path) -> None:
    print(f"{figures['bytes'] / 1e6:.0f} MB, {figures['rounds']} rounds, in {folder}")
    for kind, name in NAMES.items():
        rate = figures[f"{kind}_mb_s"]
        print(
            f"{name:22} {rate['median']:6.0f} MB/s ({rate['low']:.0f} to {rate['high']:.0f}), "
            f"{figures[f'{kind}_processor_s']:.2f} s of processor time"
        )
    for base in ("plain", "early"):
        share = figures[f"share_of_{base}"]
        print(
            f"snapshot / {NAMES[base]:21} {100 * share['median']:4.0f} % "
            f"({100 * share['low']:.0f} to {100 * share['high']:.0f} %)"
        )
    print(f"read, checked          {figures['checked_read_mb_s']:6.0f} MB/s")
    print(
        f"size: {figures['stored_bytes']} bytes for {figures['parameters']} parameters, "
        f"{figures['bytes_per_parameter']:.3f} bytes each (float32 weights and two moments are 12); "
        f"{100 * figures['overhead']:.3f} % more than the tensors"
    )
    print(
        f"an asynchronous save blocks for {1000 * figures['stall_s']:.0f} ms (the first for "
        f"{1000 * figures['first_stall_s']:.0f} ms); one copy of the bytes takes {1000 * figures['copy_s']:.0f} ms; "
        f"longest pause of a working thread while it writes {1000 * figures['longest_pause_s']:.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        parent = Path(name)
        dist.init_process_group("gloo", init_method=f"file://{parent}/store", rank=0, world_size=1)
        figures = measure(parent, arguments.megabytes, arguments.rounds)
        dist.destroy_process_group()
    if arguments.json:
        print(json.dumps(figures))
    else:
        show(figures, arguments.folder)


if __name__ == "__main__":
    main()
