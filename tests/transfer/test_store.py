"""Tests of the store's client that need no store; `test_mooncake.py` has the rest."""

from __future__ import annotations

import resource
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from specbatch.config import Store, load_config
from specbatch.errors import UserError
from specbatch.transfer import store as module
from specbatch.transfer.memory import checksum, memory
from specbatch.transfer.store import StoreClient, StoreError, _batches, own_address, store_of, usable_bytes


@dataclass
class Address:
    host: str = "127.0.0.1"
    master_port: int = 1


def test_a_checksum_is_of_the_bytes_whatever_holds_them():
    data = np.arange(1000, dtype=np.int16)
    tensor = torch.from_numpy(data.copy())
    expected = xxhash.xxh3_128_hexdigest(data.tobytes(), seed=1 << 63)
    assert checksum(data, 1 << 63) == expected
    assert checksum(tensor, 1 << 63) == expected
    assert checksum(tensor.view(torch.bfloat16), 1 << 63) == expected
    assert checksum(memory(tensor.data_ptr(), tensor.nbytes), 1 << 63) == expected
    assert checksum(tensor, 5) != expected
    assert checksum(torch.empty(0), 1) == checksum(b"", 1)


def test_a_checksum_of_scattered_memory_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        checksum(torch.zeros(4, 4)[:, :2], 0)


def test_memory_is_the_same_memory_and_no_copy():
    tensor = torch.zeros(4, dtype=torch.uint8)
    memory(tensor.data_ptr(), 4)[2] = 9
    assert tensor.tolist() == [0, 0, 9, 0]


def test_usable_bytes_are_less_than_the_segment():
    assert 0 < usable_bytes(1 << 30) < 1 << 30


def test_rdma_needs_devices():
    with pytest.raises(UserError, match=r"store\.devices: required for store\.protocol rdma"):
        StoreClient(Address(), Store(protocol="rdma"))


def test_rdma_needs_devices_that_this_node_has():
    with pytest.raises(UserError, match=r"store\.devices: nosuch_0: this node has"):
        StoreClient(Address(), Store(protocol="rdma", devices="nosuch_0"))


def test_rdma_needs_memory_that_may_be_pinned():
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, hard))
        with pytest.raises(UserError, match=r"may pin 65536 bytes on this node .* less than the 16777216"):
            module._check_memlock(16 << 20)
        module._check_memlock(1 << 16)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def test_nodes_of_a_component_may_have_rdma_devices_of_other_names(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("run: {dir: run}\ntarget: {path: t}\ndata: {train: [a.jsonl]}\n")
    config = load_config(path, ["--store.devices=mlx5_0", "--slurm.inference.devices=mlx5_2,mlx5_3"])
    assert [store_of(config, name).devices for name in ("head", "inference", "training")] == [
        "mlx5_0", "mlx5_2,mlx5_3", "mlx5_0",
    ]  # fmt: skip


def test_a_segment_below_mooncakes_minimum_is_refused():
    with pytest.raises(UserError, match=r"store\.bytes_per_rank: 1024 .* at least 16777216"):
        StoreClient(Address(), Store(), segment_bytes=1024)


def test_a_master_that_is_not_there_is_noticed_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(StoreError, match="cannot be reached"):
            own_address("127.0.0.1", taken.getsockname()[1], timeout_s=0.3)


def test_the_own_address_is_the_one_that_faces_the_head():
    with socket.create_server(("127.0.0.1", 0)) as head:
        assert own_address("127.0.0.1", head.getsockname()[1]) == "127.0.0.1"


def test_no_module_of_the_store_loads_mooncake_when_imported():
    source = Path(module.__file__).parent
    for path in source.glob("*.py"):
        lines = path.read_text().splitlines()
        assert not [line for line in lines if line.startswith(("import mooncake", "from mooncake", "import torch"))]


def test_calls_are_cut_so_that_each_has_a_bounded_number_of_bytes():
    sizes = [30 << 20, 30 << 20, 30 << 20, 200 << 20, 1, 2]
    assert _batches([0, 1, 2, 3, 5], sizes) == [[0, 1], [2], [3], [5]]
    assert _batches([], sizes) == []
