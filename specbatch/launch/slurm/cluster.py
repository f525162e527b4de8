"""What a cluster offers: its partitions, the nodes in them, and the accounts of this user.

Read from ``scontrol show partition``, ``sinfo`` and ``sacctmgr``; the parsers are pure.
"""

from __future__ import annotations

import getpass
import re
from dataclasses import dataclass, field

from specbatch.launch.slurm import commands

SINFO_FORMAT = "%R|%D|%c|%m|%G|%f|%T"
"""Rows of equal nodes of a partition, for ``sinfo --exact --noheader --format``."""


@dataclass(frozen=True)
class Nodes:
    """Nodes of a partition that are alike."""

    count: int
    cpus: int
    memory_bytes: int
    """That jobs may have; 0 if the site does not say."""
    gpus: dict[str, int]
    """GPUs of one node, by type; the type is empty where the site names none."""
    features: frozenset[str]

    @property
    def gpu_count(self) -> int:
        return sum(self.gpus.values())


@dataclass(frozen=True)
class Partition:
    """A partition."""

    name: str
    default: bool = False
    up: bool = True
    max_time_s: float | None = None
    max_nodes: int | None = None
    preempt_mode: str = "OFF"
    """Slurm's word for what becomes of a preempted job."""
    tier: int = 1
    """Jobs of partitions in higher tiers go first, and preempt."""
    accounts: frozenset[str] | None = None
    """Those that may use it; None: all."""
    nodes: tuple[Nodes, ...] = ()

    @property
    def node_count(self) -> int:
        return sum(nodes.count for nodes in self.nodes)


@dataclass(frozen=True)
class Cluster:
    """All of them."""

    partitions: dict[str, Partition]
    settings: dict[str, str] = field(default_factory=dict)
    """Slurm's own, as ``scontrol show config`` names them."""
    accounts: tuple[str, ...] | None = None
    """That this user may charge; None where the cluster keeps no accounts."""
    default_account: str = ""

    @property
    def default_partition(self) -> Partition | None:
        return next((partition for partition in self.partitions.values() if partition.default), None)

    def preemptable(self, partition: Partition) -> bool | None:
        """Whether jobs there may be preempted; None if that depends on more than the partition."""
        kind = self.settings.get("PreemptType", "preempt/none")
        if kind.endswith("qos"):
            return None
        if not kind.endswith("partition_prio") or partition.preempt_mode in ("OFF", "GANG"):
            return False
        return any(other.tier > partition.tier for other in self.partitions.values())


def read_cluster() -> Cluster:
    """Ask Slurm.

    Raises:
        SlurmError: it can't be reached.
        UserError: there is no Slurm here.
    """
    partitions = parse_partitions(commands.scontrol("--oneliner", "show", "partition"))
    nodes = parse_sinfo(commands.sinfo("--exact", f"--format={SINFO_FORMAT}"))
    joined = {
        name: Partition(**{**vars(partition), "nodes": tuple(nodes.get(name, ()))})
        for name, partition in partitions.items()
    }
    settings = parse_settings(commands.scontrol("show", "config"))
    accounts, default = _accounts(settings)
    return Cluster(joined, settings, accounts, default)


def parse_partitions(text: str) -> dict[str, Partition]:
    """Partitions, without their nodes, from ``scontrol --oneliner show partition``."""
    found = {}
    for line in text.splitlines():
        facts = dict(re.findall(r"(\w+)=(\S*)", line))
        if "PartitionName" not in facts:
            continue
        allowed = facts.get("AllowAccounts", "ALL")
        found[facts["PartitionName"]] = Partition(
            facts["PartitionName"],
            default=facts.get("Default") == "YES",
            up=facts.get("State", "UP") == "UP",
            max_time_s=seconds(facts.get("MaxTime", "")),
            max_nodes=_number(facts.get("MaxNodes", "")),
            preempt_mode=facts.get("PreemptMode", "OFF"),
            tier=_number(facts.get("PriorityTier", "")) or 1,
            accounts=None if allowed == "ALL" else frozenset(allowed.split(",")),
        )
    return found


def parse_sinfo(text: str) -> dict[str, list[Nodes]]:
    """Nodes of each partition, from rows of `SINFO_FORMAT`; nodes that are gone for good are left out."""
    found: dict[str, list[Nodes]] = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) != SINFO_FORMAT.count("|") + 1 or fields[6].startswith(("future", "unknown")):
            continue
        name, count, cpus, memory, gres, features, _ = fields
        nodes = Nodes(
            count=int(count),
            cpus=_number(cpus) or 0,
            memory_bytes=(_number(memory) or 0) << 20,
            gpus=_gpus(gres),
            features=frozenset() if features == "(null)" else frozenset(features.split(",")),
        )
        found.setdefault(name, []).append(nodes)
    return found


def parse_settings(text: str) -> dict[str, str]:
    """``scontrol show config`` by name."""
    return {name: value.strip() for name, value in re.findall(r"^(\w+)\s*= (.*)$", text, re.M)}


def seconds(text: str) -> float | None:
    """A time limit as Slurm takes and writes it: ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``,
    ``days-hours``, ``days-hours:minutes``, ``days-hours:minutes:seconds``; None for anything else, as ``UNLIMITED``."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if found is None:
        return None
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None:
        hours, minutes, rest = first or 0, second or 0, third or 0
    elif third is not None:
        hours, minutes, rest = first or 0, second or 0, third
    else:
        hours, minutes, rest = 0, first or 0, second or 0
    return float((((days or 0) * 24 + hours) * 60 + minutes) * 60 + rest)


def _accounts(settings: dict[str, str]) -> tuple[tuple[str, ...] | None, str]:
    """Accounts of this user, and the one that is charged if none is named."""
    if settings.get("AccountingStorageType", "").endswith("none"):
        return None, ""
    user = getpass.getuser()
    rows = commands.sacctmgr("show", "associations", f"user={user}", "format=account")
    if rows is None:
        return None, ""
    default = commands.sacctmgr("show", "user", user, "format=defaultaccount") or ""
    return tuple(dict.fromkeys(rows.split())), default.strip()


def _gpus(gres: str) -> dict[str, int]:
    """``gpu:4``, ``gpu:a100:4(S:0-1),shard:8``: GPUs by type."""
    found: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)", gres):
        found[kind] = found.get(kind, 0) + int(count)
    return found


def _number(text: str) -> int | None:
    found = re.match(r"\d+", text)
    return int(found[0]) if found else None
