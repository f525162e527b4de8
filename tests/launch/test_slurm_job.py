"""A job that could never start, or do its work, is refused before it is queued, with a value that would do."""

from __future__ import annotations

from pathlib import Path

import pytest

from specbatch.config import Config, load_config
from specbatch.errors import UserError
from specbatch.launch.slurm.cluster import Cluster, Nodes, Partition
from specbatch.launch.slurm.fit import check_fit
from specbatch.launch.slurm.shape import check_shape

GIB = 1 << 30
RUN = """\
run: {dir: runs/a}
target: {path: some/target}
data: {train: [a.jsonl]}
training: {ranks: 4}
inference: {engines: 4}
slurm:
  head: {partition: cpu, mem: 4G}
  inference: {partition: gpu, gpus_per_node: 4, mem: 100G}
  training: {partition: gpu, gpus_per_node: 4, mem: 100G}
"""
CPU = Nodes(10, 16, 64 * GIB, {}, frozenset())
GPU = Nodes(4, 64, 256 * GIB, {"a100": 4}, frozenset({"ib"}))
BIG = Nodes(2, 64, 512 * GIB, {"a100": 8}, frozenset({"ib", "hbm80g"}))
PARTITIONS = (
    Partition("cpu", default=True, max_time_s=86400, nodes=(CPU,)),
    Partition("gpu", max_time_s=86400, max_nodes=5, accounts=frozenset({"ml"}), nodes=(GPU, BIG)),
    Partition("idle", preempt_mode="REQUEUE", nodes=(CPU, GPU, BIG)),
    Partition("down", up=False, tier=9, nodes=(CPU,)),
)
SETTINGS = {"PreemptType": "preempt/partition_prio", "AccountingStorageEnforce": "associations,limits"}
CLUSTER = Cluster({partition.name: partition for partition in PARTITIONS}, SETTINGS, ("ml", "bio"), "ml")


def load(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "a.yaml"
    path.write_text(RUN)
    return load_config(path, [f"--{override}" for override in overrides])


def test_a_job_that_fits_says_nothing(tmp_path):
    assert check_shape(load(tmp_path)) == []
    assert check_fit(load(tmp_path), CLUSTER) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("inference.tensor_parallel=8",), "inference.tensor_parallel: 8 GPUs of an engine are more than the 4"),
        (("inference.engines=5",), "do not fit on slurm.inference.nodes: 1 .* set slurm.inference.nodes: 2, or inf"),
        (("inference.tensor_parallel=4", "inference.engines=3"), "set slurm.inference.nodes: 3, or inf"),
        (("slurm.inference.nodes=5",), "slurm.inference.nodes: 5 are more than inference.engines: 4"),
        (("slurm.training.nodes=3",), "can't be shared evenly by slurm.training.nodes: 3; try .* 3 or 6"),
        (("training.ranks=10",), "are 10 a node, .* set slurm.training.nodes: 5, or training.ranks: 4"),
        (("store.bytes_per_rank=32GiB",), "of 4 ranks a node are 128GiB, and slurm.training.mem: 100G is less"),
        (("slurm.training.mem=lots",), "slurm.training.mem: lots is no size as Slurm writes it; write 64G"),
        (("slurm.training.mem=",), "slurm.training.mem: is missing, and Slurm would give it that of .* 100G"),
        (("slurm.time=soon",), "slurm.time: soon is no time limit; write it as hours:minutes:seconds"),
        (("slurm.time=5:00",), "slurm.signal_s: 120 is more than a third of slurm.time: 5:00, .* slurm.signal_s: 50"),
        (("slurm.required=[slurm.account]",), "slurm.account: is missing, and slurm.required .* account that pays"),
        (("slurm.required=[slurm.acount]",), "slurm.required: slurm.acount is no field"),
        (("slurm.forbidden.mem=whole nodes only",), "asks for --mem=4G, which is forbidden here: whole nodes only"),
        (("slurm.layout=single", "slurm.head.mem="), "slurm.inference.mem: 100G is not slurm.training.mem: nothing"),
    ],
)  # fmt: skip
def test_what_cannot_work_in_itself_is_refused(tmp_path, overrides, message):
    if "slurm.layout=single" in overrides:
        overrides = (*overrides, "slurm.training.mem=")
    with pytest.raises(UserError, match=message):
        check_shape(load(tmp_path, *overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("slurm.training.partition=gpuu",), "training.partition: there is no partition gpuu; did you mean gpu[?]"),
        (("slurm.training.partition=zzz",), "there is no partition zzz; there are cpu, gpu, idle, down"),
        (("slurm.time=2-0",), "more than the 1-00:00:00 that partition cpu gives; set slurm.time: 1-00:00:00"),
        (("slurm.training.nodes=6",), "slurm.training.nodes: the job asks for 6 nodes of partition gpu, which gives 5"),
        (("slurm.training.gpus_per_node=9",), "slurm.training.gpus_per_node: 9 GPUs a node are more than the 8 that"),
        (("slurm.training.gpus_per_node=8", "slurm.training.nodes=4"), "only 2 nodes of partition gpu have 8"),
        (("slurm.training.mem=600G",), "slurm.training.mem: 600GiB memory a node are more than the 512GiB that"),
        (("slurm.head.cpus_per_task=17",), "slurm.head.cpus_per_task: 17 CPUs a node are more than the 16 that"),
        (("slurm.inference.cpus_per_task=17",), "slurm.inference.cpus_per_task: 68 CPUs a node are more than the 64"),
        (("store.bytes_per_rank=200GiB",), "of 4 ranks a node are 800GiB, and the nodes of partition gpu have 512GiB"),
        (("slurm.training.constraint=hbm80",), "no node of partition gpu has hbm80; did you mean hbm80g[?]"),
        (("slurm.account=mine",), "slurm.account: mine is none of your accounts; yours are ml, bio"),
        (("slurm.account=bio",), "slurm.inference.partition: gpu is not for account bio; it is for ml"),
    ],
)  # fmt: skip
def test_what_the_cluster_can_never_start_is_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        check_fit(load(tmp_path, *overrides), CLUSTER)


def test_an_account_is_missing_where_the_cluster_wants_one_and_the_user_has_no_default(tmp_path):
    with pytest.raises(UserError, match=r"slurm\.account: is missing, and you have no default account; yours are ml"):
        check_fit(load(tmp_path), Cluster(CLUSTER.partitions, SETTINGS, ("ml",)))
    with pytest.raises(UserError, match=r"slurm\.account: you have no account on this cluster"):
        check_fit(load(tmp_path), Cluster(CLUSTER.partitions, SETTINGS, ()))
    assert check_fit(load(tmp_path), Cluster(CLUSTER.partitions, {}, ("ml",))) == []
    assert check_fit(load(tmp_path), Cluster(CLUSTER.partitions, SETTINGS, None)) == []


def test_a_partition_is_missing_where_the_cluster_has_no_default(tmp_path):
    partitions = {"gpu": CLUSTER.partitions["gpu"]}
    config = load(tmp_path, "slurm.head.partition=")
    with pytest.raises(
        UserError, match=r"slurm\.partition: is missing, and this cluster has no default; there are gpu"
    ):
        check_fit(config, Cluster(partitions, SETTINGS))
    config.slurm.forbidden["partition"] = "chosen by the site"
    assert check_fit(config, Cluster(partitions, SETTINGS)) == []


def test_idle_gpus_and_a_partition_that_is_down_are_warned_of(tmp_path):
    first, second = check_shape(load(tmp_path, "inference.engines=1", "training.ranks=2"))
    assert first.startswith("inference.engines: 1 of inference.tensor_parallel: 1 leave 3 of 4 GPUs idle: 4 engines")
    assert second == "training.ranks: 2 leave 2 of 4 GPUs idle"
    (warning,) = check_fit(load(tmp_path, "slurm.head.partition=down"), CLUSTER)
    assert warning == "slurm.head.partition: down is not up: the job will wait until it is"


def test_components_of_which_only_some_may_be_preempted_are_warned_of(tmp_path):
    idle = ("slurm.inference.partition=idle", "slurm.training.partition=idle")
    (warning,) = check_fit(load(tmp_path, *idle), CLUSTER)
    assert warning.startswith("only inference (idle) and training (idle) may be preempted, head (cpu) not: Slurm")
    assert check_fit(load(tmp_path, *idle, "slurm.head.partition=idle"), CLUSTER) == []
    by_qos = Cluster(CLUSTER.partitions, {**SETTINGS, "PreemptType": "preempt/qos"})
    assert check_fit(load(tmp_path, *idle), by_qos) == []


def test_a_single_allocation_is_checked_as_a_whole(tmp_path):
    single = ("slurm.layout=single", "slurm.head_on=training")
    assert check_shape(load(tmp_path, *single)) == []
    nodes = ("slurm.training.nodes=2", "slurm.inference.nodes=4")
    with pytest.raises(UserError, match="the job asks for 6 nodes of partition gpu, which gives 5"):
        check_fit(load(tmp_path, *single, *nodes), CLUSTER)
