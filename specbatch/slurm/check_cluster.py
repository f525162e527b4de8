"""Checks a job against the cluster: partitions, limits, nodes, accounts, preemption.

Slurm accepts many jobs that it can never start, and only gives the reason why they are pending. Here they are refused,
with what the cluster offers instead.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator

from specbatch.config import Config
from specbatch.errors import UserError
from specbatch.slurm.check_request import lent_bytes, limit_s, memory_bytes, setting_text
from specbatch.slurm.cluster import Cluster, NodeGroup, Partition
from specbatch.slurm.durations import slurm_time
from specbatch.slurm.parts import JobPart, main_part, parts_of


def check_cluster(config: Config, cluster: Cluster) -> list[str]:
    """Check that the cluster can start the job.

    Returns:
        warnings, which do not prevent the job.

    Raises:
        UserError: it can't; the message begins with the key to change.
    """
    _check_account(config, cluster)
    warnings, partitions = [], {}
    asking = list(_asking(config))
    for part in asking:
        partition = _partition(config, cluster, part)
        if partition is None:
            continue
        partitions[part.name] = partition
        _check_limits(config, part, partition)
        _check_nodes(config, part, partition)
        if not partition.up:
            warnings.append(f"{_key(config, part)}: {partition.name} is not up: the job will wait until it is")
    _check_sums(asking, partitions)
    return warnings + _warn_of_preemption(config, cluster, partitions)


def _check_sums(asking: list[JobPart], partitions: dict[str, Partition]) -> None:
    """Check that a partition has enough nodes for all components in it, since components never share a node."""
    for name in dict.fromkeys(partition.name for partition in partitions.values()):
        sharing = [part for part in asking if part.name in partitions and partitions[part.name].name == name]
        partition, wanted = partitions[sharing[0].name], sum(part.nodes for part in sharing)
        if partition.nodes and wanted > partition.node_count:
            parts = ", ".join(f"slurm.{part.name}.nodes: {part.nodes}" for part in sharing)
            raise UserError(
                f"{parts}: need {wanted} nodes of partition {name} at the same time, which has {partition.node_count}; "
                "components never share a node: ask for fewer, or give one of them another partition"
            )


def _asking(config: Config) -> Iterator[JobPart]:
    """Yield the components that request nodes: not a head on a training node, and only one in a single allocation."""
    parts = {part.name: part for part in parts_of(config)}
    if config.slurm.head_on == "training":
        del parts["head"]
    if config.slurm.layout == "single":
        whole = parts[main_part(config)]
        yield JobPart(whole.name, whole.settings, sum(part.nodes for part in parts.values()), whole.tasks, whole.where)
        return
    yield from parts.values()


def _key(config: Config, part: JobPart) -> str:
    return f"slurm.{part.name}.partition" if part.settings.partition else "slurm.partition"


def _partition(config: Config, cluster: Cluster, part: JobPart) -> Partition | None:
    """Return a component's partition; None if only the site knows it."""
    name = part.settings.partition or config.slurm.partition
    if "," in name:
        return None
    if name:
        if name in cluster.partitions:
            return cluster.partitions[name]
        raise UserError(f"{_key(config, part)}: there is no partition {name}; {_nearest(name, cluster.partitions)}")
    if cluster.default_partition is None and config.slurm.forbidden.get("partition") is None:
        raise UserError(
            f"slurm.partition: is missing, and this cluster has no default; there are {', '.join(cluster.partitions)}"
        )
    return cluster.default_partition


def _nearest(name: str, known: Iterable[str]) -> str:
    there = list(known)
    near = difflib.get_close_matches(name, there, n=1)
    return f"did you mean {near[0]}? There are {', '.join(there)}" if near else f"there are {', '.join(there)}"


def _check_account(config: Config, cluster: Cluster) -> None:
    enforced = "associations" in cluster.settings.get("AccountingStorageEnforce", "").lower()
    if cluster.accounts is None or not enforced:
        return
    account, mine = config.slurm.account, ", ".join(cluster.accounts)
    if not cluster.accounts:
        raise UserError("slurm.account: you have no account on this cluster; ask its administrators for one")
    if not account and not cluster.default_account:
        raise UserError(f"slurm.account: is missing, and you have no default account; yours are {mine}")
    if account and account not in cluster.accounts:
        raise UserError(f"slurm.account: {account} is not one of your accounts; yours are {mine}")


def _check_limits(config: Config, part: JobPart, partition: Partition) -> None:
    key = _key(config, part)
    if partition.max_time_s is not None and limit_s(config) > partition.max_time_s:
        longest = slurm_time(partition.max_time_s)
        raise UserError(
            f"slurm.time: {config.slurm.time} is more than the {longest} that partition {partition.name} allows; set "
            f"slurm.time: {longest}: a run continues in as many jobs as it needs"
        )
    there = min(partition.node_count, partition.max_nodes or partition.node_count)
    if partition.nodes and part.nodes > there:
        raise UserError(
            f"slurm.{part.name}.nodes: the job asks for {part.nodes} nodes of partition {partition.name}, which allows "
            f"{there}; ask for fewer, or set {key}"
        )
    account = config.slurm.account
    if account and partition.accounts is not None and account not in partition.accounts:
        allowed = ", ".join(sorted(partition.accounts))
        raise UserError(f"{key}: {partition.name} is not for account {account}; it is for {allowed}")


def _check_nodes(config: Config, part: JobPart, partition: Partition) -> None:
    """Check that enough nodes of the partition have what the component requests of each."""
    if not partition.nodes:
        return
    settings, key = part.settings, f"slurm.{part.name}"
    nodes: list[NodeGroup] = list(partition.nodes)
    constraint = settings.constraint
    if re.fullmatch(r"[\w.-]+", constraint):
        features = sorted(set().union(*(kind.features for kind in nodes)))
        nodes = [kind for kind in nodes if constraint in kind.features]
        if not nodes:
            there = _nearest(constraint, features) if features else "its nodes have none"
            raise UserError(f"{key}.constraint: no node of partition {partition.name} has {constraint}; {there}")
    nodes = _with(
        part.nodes,
        nodes,
        settings.gpus_per_node,
        lambda kind: kind.gpu_count,
        f"{key}.gpus_per_node",
        "GPUs",
        partition,
    )
    cpus = (settings.cpus_per_task or 1) * -(-part.tasks // part.nodes)
    nodes = _with(part.nodes, nodes, cpus, lambda kind: kind.cpus, f"{key}.cpus_per_task", "CPUs", partition)
    wanted = memory_bytes(config, part.name) or 0
    nodes = _with(part.nodes, nodes, wanted, lambda kind: kind.memory_bytes, f"{key}.mem", "memory", partition)
    if part.name == "training":
        lent = lent_bytes(config)
        most = max(kind.memory_bytes for kind in nodes)
        if most and lent > most:
            raise UserError(
                f"store.bytes_per_rank: {config.store.bytes_per_rank} of "
                f"{config.training.ranks // config.slurm.training.nodes} ranks per node take {setting_text(lent)}, but "
                f"nodes of partition {partition.name} have {setting_text(most)}; set a smaller "
                "store.bytes_per_rank, or more slurm.training.nodes"
            )


def _with(
    count: int,
    nodes: list[NodeGroup],
    wanted: int,
    has: Callable[[NodeGroup], int],
    key: str,
    what: str,
    partition: Partition,
) -> list[NodeGroup]:
    """Return the nodes that have enough of something.

    Raises:
        UserError: there are too few.
    """
    enough = [kind for kind in nodes if has(kind) >= wanted]
    there = sum(kind.count for kind in enough)
    if there >= count:
        return enough
    say = setting_text if what == "memory" else str
    most = max(has(kind) for kind in nodes)
    if not there:
        raise UserError(
            f"{key}: {say(wanted)} {what} per node are more than the {say(most)} that nodes of partition "
            f"{partition.name} have; ask for {say(most)}, or set another partition"
        )
    raise UserError(
        f"{key}: only {there} nodes of partition {partition.name} have {say(wanted)} {what}, but the job asks for "
        f"{count}; ask for fewer of either, or set another partition"
    )


def _warn_of_preemption(config: Config, cluster: Cluster, partitions: dict[str, Partition]) -> list[str]:
    """Warn if only some components may be preempted: Slurm preempts a heterogeneous job as a whole or not at all."""
    by_answer: dict[bool, list[str]] = {True: [], False: []}
    for name, partition in partitions.items():
        answer = cluster.preemptable(partition)
        if answer is None:
            return []
        by_answer[answer].append(f"{name} ({partition.name})")
    if by_answer[True] and by_answer[False]:
        return [
            f"only {' and '.join(by_answer[True])} may be preempted, {' and '.join(by_answer[False])} not: Slurm "
            "preempts a heterogeneous job as a whole or not at all, so this one never is, and keeps preemptible nodes "
            "from others; put all components into preemptible partitions or none, and add engines on "
            "preemptible nodes with `specbatch scale`"
        ]
    return []
