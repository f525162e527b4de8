"""Checks what a node has and sees, without torch.

Every attempt begins with the checks in `QUICK` on each of its nodes: they find permanent mistakes in a second, before
an engine is loaded.
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from specbatch.checks.target import check_readable
from specbatch.config import Config
from specbatch.config.engine_nodes import gpus_of_engine
from specbatch.doctor.finding import Finding, Verdict, failed
from specbatch.errors import UserError
from specbatch.gpus import DEVICE_NODES, gpu_share, listed_gpus
from specbatch.inference.staging import room
from specbatch.memory_limit import memory_limit
from specbatch.run.address import LOOPBACK, node_address
from specbatch.slurm.check_request import fetched_bytes, lent_bytes
from specbatch.slurm.task import Name
from specbatch.transfer.mooncake import master_binary
from specbatch.transfer.store import check_protocol, store_of
from specbatch.units import bytes_text

EXTRAS: dict[str, tuple[str, ...]] = {"head": (), "inference": ("inference",), "training": ("training",)}
"""Optional dependencies of pyproject.toml that a component needs; the store's are checked separately."""
NEEDED = {"head": (), "inference": ("sglang", "torch"), "training": ("torch", "torchtitan")}
"""Packages among these without which the component can't start, however it was installed."""
SHM = Path("/dev/shm")
SHM_BYTES_A_RANK = 64 << 20
"""Shared memory that torch, NCCL and SGLang use between the processes of a node."""
SYSTEM_BYTES = 4 << 30
"""Memory of a node for everything else."""


@dataclass(frozen=True)
class CheckTask:
    """The task of a component in which a check runs."""

    config: Config
    component: Name
    root: Path
    """A directory that all nodes share: the run's or the doctor's."""
    task: int = 0
    """Number of the task in its component."""
    local: int = 0
    """Number of the task on its node."""
    others: tuple[str, ...] = ()
    """Names of the job's other nodes."""
    slurm: bool = True
    """Whether this is a task of a Slurm job; otherwise all components are on this machine."""

    @property
    def gpus_needed(self) -> int:
        """GPUs of this task; 0 if none were requested or, without Slurm, the machine has none."""
        config = self.config
        asked = bool(getattr(config.slurm, self.component).gpus_per_node) if self.slurm else bool(devices())
        if self.component == "head" or not asked:
            return 0
        ranks = config.training.ranks // (config.slurm.training.nodes if self.slurm else 1)
        engine = gpus_of_engine(config) if self.slurm else config.inference.tensor_parallel
        return engine if self.component == "inference" else ranks


Check = Callable[[CheckTask], Finding]


def devices() -> list[str]:
    """Return the device files of GPUs."""
    return [path for pattern in DEVICE_NODES for path in glob.glob(pattern)]


def interface(place: CheckTask) -> Finding:
    """Check the address at which this node is reached."""
    wanted = place.config.slurm.interface
    address = node_address(wanted, place.others)
    expected = f"an address on {wanted}" if wanted else "an address that other nodes reach"
    if place.slurm and address == LOOPBACK and place.others:
        return failed(
            "network interface", f"{socket.gethostname()} has only the loopback", expected,
            "set slurm.interface to one that all nodes have; `ip -4 addr` on a node lists them",
        )  # fmt: skip
    return Finding("network interface", address, expected)


def packages(place: CheckTask) -> Finding:
    """Check that the component's Python has the packages that specbatch was tested with, without importing them."""
    wanted = [f"specbatch[{','.join(EXTRAS[place.component])}]" if EXTRAS[place.component] else "specbatch"]
    missing: list[str] = []
    other: list[str] = []
    for needed in _requirements(EXTRAS[place.component]):
        try:
            there = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            (missing if needed.name in NEEDED[place.component] else other).append(f"{needed.name} is missing")
            continue
        if not needed.specifier.contains(there, prereleases=True):
            other.append(f"{needed.name} {there} (tested: {needed.specifier})")
    if importlib.util.find_spec("mooncake") is None:
        missing.append("mooncake is missing")
        wanted.append("mooncake-transfer-engine-non-cuda")
    install = f"{sys.executable} -m pip install {' '.join(repr(name) for name in wanted)}"
    if missing:
        return failed(
            "Python packages", f"{sys.executable}: {', '.join(missing + other)}", "all that the component needs",
            f"`{install}`, or name a Python that has them in slurm.{place.component}.python",
        )  # fmt: skip
    if other:
        return Finding("Python packages", ", ".join(other), "the tested versions", f"`{install}`", "warning")
    return Finding("Python packages", f"Python {sys.version.split()[0]}, all as tested", "the tested versions")


def run_directory(place: CheckTask) -> Finding:
    """Check that this node sees the shared directory, and may write in it."""
    if not (place.root / "config.yaml").is_file():
        return failed(
            "run directory", f"{socket.gethostname()} does not see {place.root}", "seen by all nodes",
            "set run.dir to a directory that all nodes share; a container has to mount it",
        )  # fmt: skip
    try:
        with tempfile.TemporaryFile(dir=place.root) as file:
            file.write(b"specbatch")
    except OSError as error:
        return failed(
            "run directory", f"{socket.gethostname()} can't write in {place.root}: {error.strerror}", "written by all",
            "check its permissions, its quota, and how it is mounted there",
        )  # fmt: skip
    return Finding("run directory", f"{place.root} is seen and written", "seen and written by all nodes")


def target(place: CheckTask) -> Finding:
    """Check that this node sees the target and may read it."""
    from specbatch.target import read_target

    check_readable(place.config)
    shape = read_target(place.config.target.path)
    with open(next(iter(shape.weights.tensors.values())).file, "rb") as file:
        file.read(1 << 20)
    return Finding("target", f"{shape.architecture} in {shape.path}", "readable on all nodes")


def copy_of_target(place: CheckTask) -> Finding:
    """Room for the target on an engine's node, where it is copied there."""
    text = place.config.slurm.stage_target
    if not (text and place.slurm and place.component == "inference"):
        return Finding("copy of the target", "none", "none: engines read the target itself")
    return Finding("copy of the target", room(text, place.config.target.path), f"room for it in {text}")


def data(place: CheckTask) -> Finding:
    """Check that this node sees the prepared data, or the files if nothing is prepared yet."""
    from specbatch.corpus import open_corpus
    from specbatch.rundir import RunDir

    run_dir = RunDir(place.root)
    if run_dir.corpus.exists():
        corpus = open_corpus(run_dir)
        corpus.sample(0)
        return Finding("data", f"{len(corpus):,} samples in {corpus.path}", "readable on all nodes")
    return sources(place.config)


def sources(config: Config) -> Finding:
    """Check that this node sees the files of the data, and may read them."""
    from specbatch.corpus.sources import find_sources

    names = [*config.data.train, *config.data.heldout]
    for source in find_sources(names):
        if hasattr(source, "path"):
            with open(source.path, "rb") as file:
                file.read(1)
    return Finding("data", f"{len(names)} entries", "readable on all nodes")


def gpus(place: CheckTask) -> Finding:
    """Check that the task gets its GPUs, and the node has a driver. `gpu` checks whether torch can use them."""
    need, there = place.gpus_needed, devices()
    if not need:
        return Finding("GPUs", "none", "none: CPUs do the work")
    expected = f"{need} for this task"
    if not there:
        return failed(
            "GPUs", f"{socket.gethostname()} has no device file of a GPU", expected,
            "request nodes with GPUs (partition, constraint), and the GPUs themselves (slurm.gpus); a container "
            "has to pass them through (--nv, --gpu)",
        )  # fmt: skip
    # Other vendors' device files can't be counted here; torch is asked before anything is started.
    count = len([path for path in there if path.startswith("/dev/nvidia")]) or need * (place.local + 1)
    mine = gpu_share(listed_gpus(), need, place.local, count)
    version = Path("/sys/module/nvidia/version")
    driver = f", driver {version.read_text().strip()}" if version.is_file() else ""
    return Finding("GPUs", f"{','.join(mine)} of {count}{driver}", expected)


def store_protocol(place: CheckTask) -> Finding:
    """Check RDMA devices and the memory that a process may pin, if the store uses them; and the store's programs."""
    config = place.config
    if place.component == "head":
        master_binary()
    lent = int(config.store.bytes_per_rank) if place.component == "training" else 0
    store = store_of(config, place.component)
    check_protocol(store, lent)
    if store.protocol == "tcp":
        return Finding("store", "over TCP", "store.protocol: tcp")
    return Finding(
        "store", f"RDMA devices {store.devices}, memory may be pinned", "those of store.devices, on this node"
    )


QUICK: tuple[tuple[str, Check], ...] = (
    ("network interface", interface),
    ("Python packages", packages),
    ("run directory", run_directory),
    ("target", target),
    ("copy of the target", copy_of_target),
    ("data", data),
    ("GPUs", gpus),
    ("store", store_protocol),
)


def shared_memory(place: CheckTask, path: Path = SHM) -> Finding:
    """Check the shared memory of a node."""
    processes = max(1, place.gpus_needed or place.config.training.ranks)
    needed, what = SHM_BYTES_A_RANK * processes, f"free space in {path}"
    free = shutil.disk_usage(path).free
    expected = f"{bytes_text(needed)}, {bytes_text(SHM_BYTES_A_RANK)} per rank"
    if free < needed:
        return failed(
            what, bytes_text(free), expected,
            f"remove old files there (`ls -l {path}`), or have it enlarged; a container accepts --shm-size",
        )  # fmt: skip
    return Finding(what, bytes_text(free), expected)


def memory(place: CheckTask) -> Finding:
    """Check the node's memory against the needs of the component."""
    from specbatch.drafts.base import algorithm_of
    from specbatch.inference.engine import buffer_bytes
    from specbatch.target import read_target

    config = place.config
    contract = algorithm_of(config, read_target(config.target.path)).contract
    needed = SYSTEM_BYTES
    if place.component == "training":
        needed += lent_bytes(config) + fetched_bytes(config, contract.bytes_per_token)
    elif place.component == "inference":
        needed += -(-config.inference.engines // config.slurm.inference.nodes) * buffer_bytes(config, contract)
    there = memory_limit()
    expected = f"{bytes_text(needed)} for packs, the store and the system"
    if there < needed:
        verdict: Verdict = "failed" if there < needed - SYSTEM_BYTES else "warning"
        return Finding(
            "memory", bytes_text(there), expected, _MORE_MEMORY.format(component=place.component), verdict
        )  # fmt: skip
    return Finding("memory", bytes_text(there), expected)


_MORE_MEMORY = "ask for more (slurm.{component}.mem), or set a smaller store.bytes_per_rank"


def compiler(place: CheckTask) -> Finding:
    """Check the compilers of kernels on a node with GPUs: for Triton and torch, and for SGLang."""
    if not place.gpus_needed:
        return Finding("C compiler", "not needed without GPUs")
    found = shutil.which(os.environ.get("CC", "")) or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if not found:
        return failed(
            "C compiler",
            "none in PATH",
            "one, for Triton",
            f"load one in slurm.{place.component}.setup: [module load gcc]",
        )
    lacking = [name for name in ("nvcc", "ninja") if place.component == "inference" and not shutil.which(name)]
    if lacking:
        return Finding(
            "C compiler", f"{found}, but no {' and no '.join(lacking)}", "nvcc and ninja, for kernels of SGLang's",
            "load CUDA in slurm.inference.setup; engines whose kernels are built already need neither", "warning",
        )  # fmt: skip
    return Finding("C compiler", found, "one, for Triton")


NODE: tuple[tuple[str, Check], ...] = (
    ("shared memory", shared_memory),
    ("memory", memory),
    ("C compiler", compiler),
)


def _requirements(extras: tuple[str, ...]) -> list[Requirement]:
    """Return the requirements of pyproject.toml, from the metadata of the installed specbatch.

    Raises:
        UserError: it is not installed in this Python.
    """
    try:
        listed = importlib.metadata.requires("specbatch") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"specbatch is not installed in {sys.executable}: pip install specbatch there") from error
    found = map(Requirement, listed)
    return [
        needed
        for needed in found
        if needed.name != "specbatch"
        and (needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)))
    ]
