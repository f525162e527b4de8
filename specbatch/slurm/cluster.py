"""Reads what a cluster offers: its partitions, the nodes in them, and the accounts of this user.

The sources are ``scontrol show partition``, ``sinfo`` and ``sacctmgr``; the parsers are pure.
"""

from __future__ import annotations

import getpass
import re
from dataclasses import dataclass, field

from specbatch.slurm import commands
from specbatch.slurm.durations import slurm_seconds

SINFO_FORMAT = "%R|%D|%c|%m|%G|%f|%T"
"""Format for ``sinfo --exact --noheader``: one row for equal nodes of a partition."""


@dataclass(frozen=True)
class NodeGroup:
    """Equal nodes of a partition."""

    count: int
    cpus: int
    memory_bytes: int
    """Bytes of memory that jobs may use; 0 if the site does not say."""
    gpus: dict[str, int]
    """GPUs of one node, by type; the type is empty if the site names none."""
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
    """Slurm's name for what happens to a preempted job."""
    tier: int = 1
    """Jobs of partitions in higher tiers start first, and preempt others."""
    accounts: frozenset[str] | None = None
    """Accounts that may use it; None for all."""
    nodes: tuple[NodeGroup, ...] = ()

    @property
    def node_count(self) -> int:
        return sum(nodes.count for nodes in self.nodes)


@dataclass(frozen=True)
class Cluster:
    """The partitions of a cluster, its settings, and this user's accounts."""

    partitions: dict[str, Partition]
    settings: dict[str, str] = field(default_factory=dict)
    """Slurm's settings, by the names of ``scontrol show config``."""
    accounts: tuple[str, ...] | None = None
    """Accounts that this user may charge; None if the cluster has no accounting."""
    default_account: str = ""

    @property
    def default_partition(self) -> Partition | None:
        return next((partition for partition in self.partitions.values() if partition.default), None)

    def preemptable(self, partition: Partition) -> bool | None:
        """Return whether jobs there may be preempted; None if that does not depend on the partition alone."""
        kind = self.settings.get("PreemptType", "preempt/none")
        if kind.endswith("qos"):
            return None
        if not kind.endswith("partition_prio") or partition.preempt_mode in ("OFF", "GANG"):
            return False
        return any(other.tier > partition.tier for other in self.partitions.values())


def read_cluster() -> Cluster:
    """Ask Slurm.

    Raises:
        SlurmError: Slurm can't be reached.
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
    """Parse ``scontrol --oneliner show partition`` into partitions, without their nodes."""
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
            max_time_s=slurm_seconds(facts.get("MaxTime", "")),
            max_nodes=_number(facts.get("MaxNodes", "")),
            preempt_mode=facts.get("PreemptMode", "OFF"),
            tier=_number(facts.get("PriorityTier", "")) or 1,
            accounts=None if allowed == "ALL" else frozenset(allowed.split(",")),
        )
    return found


def parse_sinfo(text: str) -> dict[str, list[NodeGroup]]:
    """Parse rows of `SINFO_FORMAT` into the nodes of each partition, without nodes that are permanently gone."""
    found: dict[str, list[NodeGroup]] = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) != SINFO_FORMAT.count("|") + 1 or fields[6].startswith(("future", "unknown")):
            continue
        name, count, cpus, memory, gres, features, _ = fields
        nodes = NodeGroup(
            count=int(count),
            cpus=_number(cpus) or 0,
            memory_bytes=(_number(memory) or 0) << 20,
            gpus=_gpus(gres),
            features=frozenset() if features == "(null)" else frozenset(features.split(",")),
        )
        found.setdefault(name, []).append(nodes)
    return found


def parse_settings(text: str) -> dict[str, str]:
    """Parse ``scontrol show config`` into settings by name."""
    return {name: value.strip() for name, value in re.findall(r"^(\w+)\s*= (.*)$", text, re.M)}


def _accounts(settings: dict[str, str]) -> tuple[tuple[str, ...] | None, str]:
    """Return the accounts of this user, and the default one."""
    if settings.get("AccountingStorageType", "").endswith("none"):
        return None, ""
    user = getpass.getuser()
    rows = commands.sacctmgr("show", "associations", f"user={user}", "format=account")
    if rows is None:
        return None, ""
    default = commands.sacctmgr("show", "user", user, "format=defaultaccount") or ""
    return tuple(dict.fromkeys(rows.split())), default.strip()


def _gpus(gres: str) -> dict[str, int]:
    """Parse GPUs by type from texts such as ``gpu:4`` or ``gpu:a100:4(S:0-1),shard:8``."""
    found: dict[str, int] = {}
    for kind, count in re.findall(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)", gres):
        found[kind] = found.get(kind, 0) + int(count)
    return found


def _number(text: str) -> int | None:
    found = re.match(r"\d+", text)
    return int(found[0]) if found else None
