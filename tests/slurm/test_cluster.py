"""Partitions, nodes and limits, as Slurm prints them."""

from __future__ import annotations

import pytest

from specbatch.slurm.cluster import Cluster, parse_partitions, parse_settings, parse_sinfo
from specbatch.slurm.durations import slurm_seconds

PARTITIONS = """\
PartitionName=cpu AllowGroups=ALL AllowAccounts=ALL Default=YES MaxNodes=UNLIMITED MaxTime=1-00:00:00 Nodes=node[1-6] \
PriorityTier=1 PreemptMode=OFF State=UP TotalNodes=6
PartitionName=idle AllowGroups=ALL AllowAccounts=ml,bio Default=NO MaxNodes=4 MaxTime=UNLIMITED Nodes=node[1-6] \
PriorityTier=1 PreemptMode=REQUEUE State=UP TotalNodes=6
PartitionName=high AllowGroups=ALL AllowAccounts=ALL Default=NO MaxNodes=4 MaxTime=02:00:00 Nodes=node[1-6] \
PriorityTier=10 PreemptMode=REQUEUE State=DOWN TotalNodes=6
"""
SINFO = """\
cpu|2|8|16000|(null)|(null)|idle
gpu|4|128|515000+|gpu:a100:4(S:0-1),shard:8|gpu,hbm80g|mixed
gpu|1|8|16000|gpu:2,gpu:v100:1|(null)|down*
"""


def test_partitions_are_read():
    found = parse_partitions(PARTITIONS)
    assert list(found) == ["cpu", "idle", "high"]
    assert (found["cpu"].default, found["cpu"].max_time_s, found["cpu"].max_nodes) == (True, 86400, None)
    assert found["idle"].accounts == {"ml", "bio"}
    assert (found["idle"].max_time_s, found["idle"].max_nodes) == (None, 4)
    assert not found["high"].up


def test_nodes_are_read_with_their_gpus_by_type():
    found = parse_sinfo(SINFO)
    big, small = found["gpu"]
    assert (big.count, big.cpus, big.memory_bytes, big.gpus) == (4, 128, 515000 << 20, {"a100": 4})
    assert big.features == {"gpu", "hbm80g"}
    assert small.gpus == {"": 2, "v100": 1}
    assert small.gpu_count == 3
    assert found["cpu"][0].gpus == {}


def test_jobs_of_a_partition_are_preempted_only_by_those_of_a_higher_tier():
    found = parse_partitions(PARTITIONS)
    settings = parse_settings("Configuration data as of now\nPreemptMode             = REQUEUE\n")
    assert settings == {"PreemptMode": "REQUEUE"}
    cluster = Cluster(found, {"PreemptType": "preempt/partition_prio"})
    assert [cluster.preemptable(found[name]) for name in found] == [False, True, False]
    assert Cluster(found, {"PreemptType": "preempt/none"}).preemptable(found["idle"]) is False
    assert Cluster(found, {"PreemptType": "preempt/qos"}).preemptable(found["idle"]) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 1800), ("30:15", 1815), ("2:00:00", 7200), ("1-0", 86400), ("1-12:30", 131400), ("2-00:00:01", 172801),
        ("UNLIMITED", None), ("soon", None), ("05:01.250", 301), ("1.5", None),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(text, expected):
    assert slurm_seconds(text) == expected
