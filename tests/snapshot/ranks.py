"""Run a function on several gloo ranks, each a process of its own."""

import os
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing


def on_ranks(ranks, function, *args):
    """Call ``function(rank, *args)`` on every rank of a process group; raise what any of them raised."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (ranks, Path(folder) / "store", function, args), nprocs=ranks)


def _rank(rank, ranks, store, function, args):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    function(rank, *args)
    dist.destroy_process_group()
    # As in `specbatch.training.process.exit`: threads that the interpreter's end finds may abort it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
