"""Prints what a task of a step was given: ``python -m tests.cluster.seen COMPONENT GPUS``."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from specbatch.gpus import gpu_share, listed_gpus

GPUS_OF_NODE = 4


def main(component: str, need: int) -> None:
    """Print the component, its GPUs as a run would share them out, and the CPUs that its processes may use."""
    cpus = re.search(r"Cpus_allowed_list:\s*(\S+)", Path("/proc/self/status").read_text())
    mine = gpu_share(listed_gpus(), need, int(os.environ["SLURM_LOCALID"]), GPUS_OF_NODE)
    found = [component, ",".join(mine), os.environ.get("SLURM_CPUS_PER_TASK"), cpus and cpus[1]]
    # In one piece: other tasks write into the same log.
    os.write(1, f"seen {json.dumps(found)}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
