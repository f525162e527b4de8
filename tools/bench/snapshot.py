#!/usr/bin/env python3
"""What a snapshot costs: MB/s beside a plain write + fsync of the same bytes, and how long training stands still.

    tools/bench/snapshot.py [--megabytes 512] [--repeats 3] [--folder DIR]

Plain writes, snapshots and torch's own FileSystemWriter take turns, so that a neighbour's load meets all of them. The
best of each counts. The folder decides which disk is measured. Where others work too, look at the processor time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from specbatch.snapshot.reading import read_tensors
from specbatch.snapshot.storage import HDF5Writer


def state_of(megabytes: int) -> dict[str, torch.Tensor]:
    """A draft's weights and both of its optimizer moments, float32, in matrices of up to 64 MB."""
    rows = max(1, megabytes // 3 // 16)
    return {f"{part}.{i}": torch.randn(1024, 4096) for part in ("w", "exp_avg", "exp_avg_sq") for i in range(rows)}


def plain(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """The same bytes into one file, and wait for the disk."""
    with (folder / "plain").open("wb", buffering=0) as file:
        for tensor in state.values():
            view = memoryview(tensor.numpy()).cast("B")
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())


def snapshot(folder: Path, state: dict[str, torch.Tensor]) -> None:
    dcp.save(state, storage_writer=HDF5Writer(folder / "step-1", step=1))


def torchs(folder: Path, state: dict[str, torch.Tensor]) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "torch"))


def cost(
    write: Callable[[Path, dict[str, torch.Tensor]], None], parent: Path, state: dict[str, torch.Tensor]
) -> tuple[float, float]:
    """Seconds, and seconds of processor time, of one write into an empty folder."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        began, worked = time.perf_counter(), time.process_time()
        write(folder, state)
        return time.perf_counter() - began, time.process_time() - worked
    finally:
        shutil.rmtree(folder)


def stalls(parent: Path, state: dict[str, torch.Tensor], repeats: int) -> dict[str, float]:
    """Seconds that an asynchronous save blocks its caller, and the longest pause of a thread that works meanwhile."""
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )
    blocked, pauses = [], []
    for _ in range(repeats + 1):
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
    return {"first_stall_s": blocked[0], "stall_s": min(blocked[1:]), "longest_pause_s": min(pauses[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    state = state_of(arguments.megabytes)
    size = sum(tensor.nbytes for tensor in state.values())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        parent = Path(name)
        dist.init_process_group("gloo", init_method=f"file://{parent}/store", rank=0, world_size=1)
        taken: dict[str, list[tuple[float, float]]] = {"plain": [], "snapshot": [], "torch": []}
        for _ in range(arguments.repeats):
            for kind, write in (("plain", plain), ("snapshot", snapshot), ("torch", torchs)):
                taken[kind].append(cost(write, parent, state))
        snapshot(parent, state)
        began = time.perf_counter()
        read_tensors(parent / "step-1")
        reading = time.perf_counter() - began
        shutil.rmtree(parent / "step-1")
        pauses = stalls(parent, state, arguments.repeats)
        dist.destroy_process_group()
    best = {kind: min(wall for wall, _ in times) for kind, times in taken.items()}
    figures = {
        "bytes": size,
        **{f"{kind}_mb_s": size / 1e6 / s for kind, s in best.items()},
        **{f"{kind}_processor_s": min(worked for _, worked in times) for kind, times in taken.items()},
        "share_of_plain": best["plain"] / best["snapshot"],
        "checked_read_mb_s": size / 1e6 / reading,
        **pauses,
    }
    if arguments.json:
        print(json.dumps(figures))
        return
    print(f"{size / 1e6:.0f} MB, best of {arguments.repeats}, in {arguments.folder}")
    for kind, name in (("plain", "plain write + fsync"), ("snapshot", "snapshot"), ("torch", "torch FileSystemWriter")):
        rate, worked = figures[f"{kind}_mb_s"], figures[f"{kind}_processor_s"]
        print(f"{name:22} {rate:7.0f} MB/s, {worked:.2f} s of processor time")
    print(f"snapshot / plain       {100 * figures['share_of_plain']:7.0f} %")
    print(f"read, checked          {figures['checked_read_mb_s']:7.0f} MB/s")
    print(
        f"an asynchronous save blocks for {1000 * figures['stall_s']:.0f} ms (the first for "
        f"{1000 * figures['first_stall_s']:.0f} ms); longest pause of a working thread meanwhile "
        f"{1000 * figures['longest_pause_s']:.0f} ms"
    )


if __name__ == "__main__":
    main()
