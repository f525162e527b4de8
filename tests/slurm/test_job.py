"""A job that could never start, or do its work, is refused before it is queued, with a value that would do."""

from __future__ import annotations

from pathlib import Path

import pytest

from specbatch.config import Config, load_config
from specbatch.errors import UserError
from specbatch.slurm.check_cluster import check_cluster
from specbatch.slurm.check_request import check_node_memory, check_request, check_stage, fetched_bytes
from specbatch.slurm.cluster import Cluster, NodeGroup, Partition
from specbatch.slurm.cpu_share import with_cpus
from specbatch.slurm.parts import parts_of

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
CPU = NodeGroup(10, 16, 64 * GIB, {}, frozenset())
GPU = NodeGroup(4, 64, 256 * GIB, {"a100": 4}, frozenset({"ib"}))
BIG = NodeGroup(2, 64, 512 * GIB, {"a100": 8}, frozenset({"ib", "hbm80g"}))
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
    assert check_request(load(tmp_path)) == []
    assert check_cluster(load(tmp_path), CLUSTER) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("inference.tensor_parallel=8",), "nodes: 1 are not .*engines: 4 with the 2 nodes .*nodes: 8"),
        (("inference.tensor_parallel=5",), "5 can't be shared evenly by the 2 nodes .* is 4; try .*: 4 or 6"),
        (("inference.nodes_per_engine=2",), "1 can't be shared evenly by inference.nodes_per_engine: 2; try .*: 2"),
        (("inference.nodes_per_engine=1", "inference.tensor_parallel=8"), "are 8 GPUs a node, .*_engine: 2, or"),
        (("inference.engines=5",), "do not fit on slurm.inference.nodes: 1 .* set slurm.inference.nodes: 2, or inf"),
        (("inference.tensor_parallel=4", "inference.engines=3"), "set slurm.inference.nodes: 3, or inf"),
        (("slurm.inference.nodes=5",), "slurm.inference.nodes: 5 are more than inference.engines: 4"),
        (("slurm.training.nodes=3",), "can't be shared evenly by slurm.training.nodes: 3; try .* 3 or 6"),
        (("training.ranks=10",), "are 10 a node, .* set slurm.training.nodes: 5, or training.ranks: 4"),
        (("store.bytes_per_rank=32GiB",), "of 4 ranks a node are 128GiB, and slurm.training.mem: 100G is less"),
        (("slurm.training.mem=lots",), "slurm.training.mem: lots is not a size in Slurm's format; write 64G"),
        (("slurm.training.mem=",), "slurm.training.mem: is missing, and Slurm would use that of .* 100G"),
        (("slurm.time=soon",), "slurm.time: soon is not a time limit; write it as hours:minutes:seconds"),
        (("slurm.time=5:00",), "slurm.signal_s: 120 is more than a third of slurm.time: 5:00, .* slurm.signal_s: 50"),
        (("slurm.required=[slurm.account]",), "slurm.account: is missing, and slurm.required .* is charged"),
        (("slurm.required=[slurm.acount]",), "slurm.required: slurm.acount is not a field"),
        (("slurm.forbidden.mem=whole nodes only",), "requests --mem=4G, which is forbidden here: whole nodes only"),
        (("slurm.qos=debug", "slurm.forbidden.qos={debug: no chains}"), "requests --qos=debug, .* no chains; choose"),
        (("slurm.ports=5-6",), "slurm.ports: 5-6 is not a range of 100 ports or more"),
        (("slurm.layout=single", "slurm.head.mem="), "slurm.inference.mem: 100G is not slurm.training.mem: nothing"),
    ],
)  # fmt: skip
def test_what_cannot_work_in_itself_is_refused(tmp_path, overrides, message):
    if "slurm.layout=single" in overrides:
        overrides = (*overrides, "slurm.training.mem=")
    with pytest.raises(UserError, match=message):
        check_request(load(tmp_path, *overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("slurm.training.partition=gpuu",), "training.partition: there is no partition gpuu; did you mean gpu[?]"),
        (("slurm.training.partition=zzz",), "there is no partition zzz; there are cpu, gpu, idle, down"),
        (("slurm.time=2-0",), "more than the 1-00:00:00 that partition cpu allows; set slurm.time: 1-00:00:00"),
        (("slurm.training.nodes=6",), "training.nodes: the job asks for 6 nodes of partition gpu, which allows 5"),
        (("slurm.training.gpus_per_node=9",), "slurm.training.gpus_per_node: 9 GPUs per node are more than the 8 that"),
        (("slurm.training.gpus_per_node=8", "slurm.training.nodes=4"), "only 2 nodes of partition gpu have 8"),
        (("slurm.training.mem=600G",), "slurm.training.mem: 600GiB memory per node are more than the 512GiB that"),
        (("slurm.head.cpus_per_task=17",), "slurm.head.cpus_per_task: 17 CPUs per node are more than the 16 that"),
        (("slurm.inference.cpus_per_task=17",), "slurm.inference.cpus_per_task: 68 CPUs per node are more than the 64"),
        (("store.bytes_per_rank=200GiB",), "of 4 ranks per node take 800GiB, but nodes of partition gpu have 512GiB"),
        (("slurm.training.constraint=hbm80",), "no node of partition gpu has hbm80; did you mean hbm80g[?]"),
        (("slurm.account=mine",), "slurm.account: mine is not one of your accounts; yours are ml, bio"),
        (("slurm.account=bio",), "slurm.inference.partition: gpu is not for account bio; it is for ml"),
    ],
)  # fmt: skip
def test_what_the_cluster_can_never_start_is_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        check_cluster(load(tmp_path, *overrides), CLUSTER)


def test_an_engine_larger_than_a_node_has_its_nodes_to_itself(tmp_path):
    spread = ("inference.tensor_parallel=8", "inference.engines=2", "slurm.inference.nodes=4")
    config = load(tmp_path, *spread)
    assert check_request(config) == []
    inference = next(part for part in parts_of(config) if part.name == "inference")
    assert (inference.nodes, inference.tasks) == (4, 4)
    on_cpus = ("inference.tensor_parallel=2", "inference.nodes_per_engine=2", "slurm.inference.gpus_per_node=0")
    assert check_request(load(tmp_path, *on_cpus, "slurm.inference.nodes=2", "inference.engines=1")) == []
    (idle,) = check_request(load(tmp_path, *spread, "inference.tensor_parallel=6"))
    assert idle.endswith("leave 4 of 16 GPUs idle: inference.tensor_parallel: 8 would use them")


def test_an_account_is_missing_where_the_cluster_wants_one_and_the_user_has_no_default(tmp_path):
    with pytest.raises(UserError, match=r"slurm\.account: is missing, and you have no default account; yours are ml"):
        check_cluster(load(tmp_path), Cluster(CLUSTER.partitions, SETTINGS, ("ml",)))
    with pytest.raises(UserError, match=r"slurm\.account: you have no account on this cluster"):
        check_cluster(load(tmp_path), Cluster(CLUSTER.partitions, SETTINGS, ()))
    assert check_cluster(load(tmp_path), Cluster(CLUSTER.partitions, {}, ("ml",))) == []
    assert check_cluster(load(tmp_path), Cluster(CLUSTER.partitions, SETTINGS, None)) == []


def test_a_partition_is_missing_where_the_cluster_has_no_default(tmp_path):
    partitions = {"gpu": CLUSTER.partitions["gpu"]}
    config = load(tmp_path, "slurm.head.partition=")
    with pytest.raises(
        UserError, match=r"slurm\.partition: is missing, and this cluster has no default; there are gpu"
    ):
        check_cluster(config, Cluster(partitions, SETTINGS))
    config.slurm.forbidden["partition"] = "chosen by the site"
    assert check_cluster(config, Cluster(partitions, SETTINGS)) == []


def test_idle_gpus_and_a_partition_that_is_down_are_warned_of(tmp_path):
    first, second = check_request(load(tmp_path, "inference.engines=1", "training.ranks=2"))
    assert first.startswith("inference.engines: 1 of inference.tensor_parallel: 1 leave 3 of 4 GPUs idle: 4 engines")
    assert second == "training.ranks: 2 leave 2 of 4 GPUs idle"
    (warning,) = check_cluster(load(tmp_path, "slurm.head.partition=down"), CLUSTER)
    assert warning == "slurm.head.partition: down is not up: the job will wait until it is"


def test_components_of_which_only_some_may_be_preempted_are_warned_of(tmp_path):
    idle = ("slurm.inference.partition=idle", "slurm.training.partition=idle")
    (warning,) = check_cluster(load(tmp_path, *idle), CLUSTER)
    assert warning.startswith("only inference (idle) and training (idle) may be preempted, head (cpu) not: Slurm")
    assert check_cluster(load(tmp_path, *idle, "slurm.head.partition=idle"), CLUSTER) == []
    by_qos = Cluster(CLUSTER.partitions, {**SETTINGS, "PreemptType": "preempt/qos"})
    assert check_cluster(load(tmp_path, *idle), by_qos) == []


def test_values_of_a_directive_are_forbidden_one_by_one(tmp_path):
    assert check_request(load(tmp_path, "slurm.qos=regular", "slurm.forbidden.qos={debug: no chains}")) == []


def test_components_that_share_a_partition_are_added_up(tmp_path):
    nodes = ("slurm.training.nodes=4", "slurm.inference.nodes=3")
    with pytest.raises(UserError, match="need 7 nodes of partition gpu at the same time, which has 6; components"):
        check_cluster(load(tmp_path, *nodes), CLUSTER)
    assert check_cluster(load(tmp_path, "slurm.training.nodes=4", "slurm.inference.nodes=2"), CLUSTER) == []


def test_packs_on_their_way_count_towards_a_node_s_memory(tmp_path):
    # Four ranks lend 4 GiB each, and fetch 2 packs of 3 steps: 32 KiB a token are 0.75 GiB, which torch pins as 1 GiB.
    check_node_memory(load(tmp_path, "slurm.training.mem=20G"), 32 << 10)
    with pytest.raises(UserError, match=r"mem: 19G is less than the 16GiB .* and the 4GiB for fetched packs"):
        check_node_memory(load(tmp_path, "slurm.training.mem=19G"), 32 << 10)
    on_cpus = load(tmp_path, "slurm.training.mem=19G", "slurm.training.gpus_per_node=0")
    assert fetched_bytes(on_cpus, 32 << 10) == 3 << 30
    check_node_memory(load(tmp_path, "slurm.training.mem=0"), 32 << 10)


@pytest.mark.parametrize("how", ["launch=ch-run image --", "srun=[--container-image=a.sqsh]"])
def test_a_container_names_its_own_python(tmp_path, how):
    with pytest.raises(UserError, match=r"slurm.training.python: is missing: a container need not have the Python"):
        check_request(load(tmp_path, f"slurm.training.{how}"))
    assert check_request(load(tmp_path, f"slurm.training.{how}", "slurm.training.python=python3")) == []


def test_a_copy_of_the_target_in_memory_counts_to_the_memory_of_an_engines_node(tmp_path):
    check_stage(load(tmp_path, "slurm.stage_target=/dev/shm"), 100 * GIB)
    with pytest.raises(UserError, match=r"slurm.inference.mem: 100G is less than the 101GiB of the target's weights"):
        check_stage(load(tmp_path, "slurm.stage_target=/dev/shm"), 101 * GIB)
    check_stage(load(tmp_path, "slurm.stage_target=/dev/shm", "slurm.inference.mem=0"), 101 * GIB)
    check_stage(load(tmp_path, "slurm.stage_target=$TMPDIR/here"), 101 * GIB)
    with pytest.raises(UserError, match=r"slurm.stage_target: scratch is no absolute path; give a directory of the"):
        check_stage(load(tmp_path, "slurm.stage_target=scratch"), 0)


def test_tasks_with_gpus_get_an_even_share_of_a_node_s_cpus(tmp_path):
    def chosen(*overrides: str, cluster: Cluster | None = CLUSTER) -> tuple[list[int | None], list[str]]:
        config, said = with_cpus(load(tmp_path, *overrides), cluster)
        return [getattr(config.slurm, name).cpus_per_task for name in ("head", "inference", "training")], said

    # Nodes of 64 CPUs and 4 GPUs or 8: the smaller share is what all of them have.
    cpus, said = chosen()
    assert cpus == [None, 8, 32]
    assert said[0] == "slurm.inference.cpus_per_task: 8, by an even share of a node's 64 CPUs among its 8 GPUs"
    assert chosen("inference.tensor_parallel=4")[0] == [None, 32, 32]
    assert chosen("slurm.inference.cpus_per_task=3", "slurm.training.gpus_per_node=0")[0] == [None, 3, None]
    assert chosen("slurm.cpus_per_gpu=12", cluster=None)[0] == [None, 12, 48]
    assert chosen(cluster=None) == ([None, None, None], [])
    config, _ = with_cpus(load(tmp_path), CLUSTER)
    assert check_cluster(config, CLUSTER) == []


def test_a_single_allocation_is_checked_as_a_whole(tmp_path):
    single = ("slurm.layout=single", "slurm.head_on=training")
    assert check_request(load(tmp_path, *single)) == []
    nodes = ("slurm.training.nodes=2", "slurm.inference.nodes=4")
    with pytest.raises(UserError, match="the job asks for 6 nodes of partition gpu, which allows 5"):
        check_cluster(load(tmp_path, *single, *nodes), CLUSTER)
