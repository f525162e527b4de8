import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from specbatch.snapshot.manifest import DamagedSnapshot, read_manifest, snapshot_path, whole_snapshots
from specbatch.snapshot.reading import damage, read_tensors
from specbatch.snapshot.storage import HDF5Reader, HDF5Writer
from tests.snapshot.ranks import on_ranks

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.uint16, torch.bool, torch.complex64),
]
VALUES = {"lr": 1e-5, "betas": (0.9, 0.999), "fused": None, "on": True, "names": ["a", "b"], "deep": {"er": 3}}


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bits(a.reshape(-1)) == bits(b.reshape(-1))


def tensors():
    """One of each type and of each odd shape, from a seed."""
    torch.manual_seed(3)
    every = {str(dtype): (torch.randn(5, 7) * 3).to(dtype) for dtype in DTYPES}
    odd = {"scalar": torch.tensor(3.5), "bf16 scalar": torch.tensor(1.5).bfloat16(), "empty": torch.empty(0, 4)}
    return {**every, **odd, "nan": torch.tensor([float("nan"), -0.0, float("inf")]), "strided": torch.randn(4, 6).t()}


def state():
    return {"model": tensors(), "optimizer": dict(VALUES)}


def blank():
    return {
        "model": {k: torch.empty_like(v) for k, v in tensors().items()},
        "optimizer": dict.fromkeys(VALUES) | {"deep": {"er": 0}},
    }


def save(folder, step=1, saved=None, **kwargs):
    path = folder / f"step-{step}"
    dcp.save(saved or state(), storage_writer=HDF5Writer(path, step=step, **kwargs), no_dist=True)
    return path


def load(path):
    loaded = blank()
    dcp.load(loaded, storage_reader=HDF5Reader(path), no_dist=True)
    return loaded


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_every_type_and_shape_comes_back_bit_for_bit(tmp_path):
    loaded = load(save(tmp_path))
    for name, tensor in tensors().items():
        assert same(loaded["model"][name], tensor), name
    assert loaded["optimizer"] == VALUES


def test_bfloat16_keeps_all_of_its_values(tmp_path):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    stored = read_tensors(save(tmp_path, saved={"w": every}))["w"]
    assert torch.equal(stored.view(torch.uint16), every.view(torch.uint16))


def test_a_snapshot_says_what_it_is(tmp_path):
    manifest = read_manifest(save(tmp_path, step=12, facts={"plan": {"seed": 3}}))
    assert (manifest.step, manifest.ranks, manifest.facts) == (12, 1, {"plan": {"seed": 3}})
    assert manifest.values["optimizer.lr"] == 1e-5


def test_a_snapshot_holds_no_pickle_and_others_may_read_it(tmp_path):
    path = save(tmp_path)
    assert {p.name for p in path.iterdir()} == {"manifest.json", "rank-0.h5"}
    for file in path.iterdir():
        assert file.stat().st_mode & 0o444 == 0o444
        assert b"ctorch" not in file.read_bytes()
    with h5py.File(path / "rank-0.h5") as file:
        assert file["model.scalar"][()] == 3.5
        assert file["model.torch.bfloat16"].attrs["dtype"] == "bfloat16"
        assert {"dtype", "xxh3_128"} <= set(file["model.empty"].attrs)


def test_tensors_are_chosen_by_name_or_prefix(tmp_path):
    path = save(tmp_path)
    assert set(read_tensors(path, prefix="model.s")) == {"model.scalar", "model.strided"}
    assert set(read_tensors(path, names=["model.empty", "model.missing"])) == {"model.empty"}


def test_what_the_snapshot_lacks_is_an_error(tmp_path):
    path = save(tmp_path, saved={"w": torch.ones(3)})
    with pytest.raises(CheckpointException, match="Missing key in checkpoint state_dict: v"):
        dcp.load({"v": torch.ones(3)}, storage_reader=HDF5Reader(path), no_dist=True)


def newest_sound(folder):
    """The newest step whose snapshot is whole and undamaged; None if there is none."""
    return max((step for step in whole_snapshots(folder) if not [*damage(snapshot_path(folder, step))]), default=None)


def flip(file, what):
    """Flip one bit of the first place where ``what`` stands."""
    data = bytearray(file.read_bytes())
    at = data.index(what)
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["torch.bfloat16", "torch.bool", "scalar", "strided"])
def test_one_flipped_bit_is_refused_by_file_and_tensor(tmp_path, name):
    save(tmp_path, step=1)
    path = save(tmp_path, step=2)
    flip(path / "rank-0.h5", bits(tensors()[name].contiguous().reshape(-1)))
    with pytest.raises(DamagedSnapshot, match=rf"step-2/rank-0\.h5: tensor model\.{name} .*checksum differs"):
        read_tensors(path)
    with pytest.raises(DamagedSnapshot, match=name):
        read_tensors(path, prefix=f"model.{name}")
    with pytest.raises(CheckpointException) as error:
        load(path)
    assert isinstance(error.value.failures[0][0], DamagedSnapshot)
    assert newest_sound(tmp_path) == 1


def test_damage_anywhere_in_a_file_is_seen_or_touches_no_value(tmp_path):
    saved = {"a": torch.arange(40.0), "b": torch.tensor(2), "c": torch.ones(3).bool()}
    path = save(tmp_path, saved=saved)
    file = path / "rank-0.h5"
    good = file.read_bytes()
    seen = 0
    for position in range(0, len(good), 13):
        file.write_bytes(good[:position] + bytes([good[position] ^ 16]) + good[position + 1 :])
        try:
            found = read_tensors(path)
        except DamagedSnapshot:
            seen += 1
        else:
            assert all(same(found[name], saved[name]) for name in saved), position
    assert seen > 20


def test_a_file_of_another_save_of_the_same_step_is_refused(tmp_path):
    path = save(tmp_path, saved={"w": torch.ones(3)})
    older = (path / "rank-0.h5").read_bytes()
    save(tmp_path, saved={"w": torch.zeros(3)})
    (path / "rank-0.h5").write_bytes(older)
    with pytest.raises(DamagedSnapshot, match="tensor w"):
        read_tensors(path)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_file_makes_a_snapshot_none(tmp_path, keep):
    save(tmp_path, step=1)
    file = save(tmp_path, step=2) / "rank-0.h5"
    file.write_bytes(file.read_bytes()[:keep])
    assert whole_snapshots(tmp_path) == [1]
    with pytest.raises(DamagedSnapshot, match=r"step-2/rank-0\.h5 has"):
        load(tmp_path / "step-2")
    assert newest_sound(tmp_path) == 1


def test_without_any_whole_snapshot_there_is_none_to_load(tmp_path):
    (save(tmp_path) / "manifest.json").unlink()
    assert newest_sound(tmp_path) is None


KILLED = """
import os, signal, sys
from pathlib import Path
import torch, torch.distributed.checkpoint as dcp
from specbatch.snapshot.storage import HDF5Writer

class Dies(dcp.DefaultSavePlanner):
    def resolve_data(self, item):
        if item.index.fqn == "c":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().resolve_data(item)

state = {name: torch.rand(300, 300) for name in "abcd"}
dcp.save(state, storage_writer=HDF5Writer(Path(sys.argv[1]), step=2), planner=Dies(), no_dist=True)
"""


@pytest.mark.light
@pytest.mark.parametrize("again", [False, True])
def test_a_save_that_is_killed_leaves_no_snapshot_of_its_step(tmp_path, again):
    save(tmp_path, step=1)
    if again:
        save(tmp_path, step=2)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "step-2")])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "step-2" / "rank-0.h5").stat().st_size > 0
    assert whole_snapshots(tmp_path) == [1]
    save(tmp_path, step=2)
    assert newest_sound(tmp_path) == 2


def sharded(mesh):
    """Sharded evenly, unevenly, over columns, with an empty shard, and replicated."""
    full = tensors()
    one = {
        name: distribute_tensor(full[name], mesh, [Shard(0)]) for name in ("torch.float32", "torch.bfloat16", "empty")
    }
    few = {"few": distribute_tensor(torch.arange(2.0), mesh, [Shard(0)])}
    return {"columns": distribute_tensor(full["torch.int64"], mesh, [Shard(1)]), **one, **few, "scalar": full["scalar"]}


def save_and_load(rank, folder, ranks):
    mesh = init_device_mesh("cpu", (ranks,))
    mine = {"model": sharded(mesh), "optimizer": dict(VALUES)}
    one_rank_fails(rank, folder / "failed", mine)
    future = dcp.async_save(mine, storage_writer=HDF5Writer(folder / f"step-{ranks}", step=ranks))
    future.result()
    for step in range(1, ranks + 1):
        read = {"model": {k: v.clone().zero_() for k, v in sharded(mesh).items()}, "optimizer": {"betas": None}}
        dcp.load(read, storage_reader=HDF5Reader(folder / f"step-{step}"))
        assert read["optimizer"] == {"betas": (0.9, 0.999)}
        for name, tensor in sharded(mesh).items():
            assert same(local(read["model"][name]), local(tensor)), (step, name)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def one_rank_fails(rank, folder, mine):
    class Fails(dcp.DefaultSavePlanner):
        def resolve_data(self, item):
            if rank == 1:
                raise OSError(28, "No space left on device")
            return super().resolve_data(item)

    with pytest.raises(CheckpointException, match="No space left"):
        dcp.save(mine, storage_writer=HDF5Writer(folder / "step-1", step=1), planner=Fails())
    assert whole_snapshots(folder) == []


@pytest.mark.light
@pytest.mark.timeout(600)
def test_snapshots_load_on_any_number_of_ranks_and_a_rank_that_fails_fails_the_save_on_all(tmp_path):
    full = {name: tensors()[name] for name in ("torch.float32", "torch.bfloat16", "empty", "scalar")}
    full |= {"few": torch.arange(2.0), "columns": tensors()["torch.int64"]}
    save(tmp_path, saved={"model": full, "optimizer": VALUES})
    for ranks in (2, 3):
        on_ranks(ranks, save_and_load, tmp_path, ranks)
    assert {p.name for p in (tmp_path / "step-3").iterdir()} == {"manifest.json", *(f"rank-{r}.h5" for r in range(3))}
    for ranks in (2, 3):
        whole = read_tensors(tmp_path / f"step-{ranks}", prefix="model.")
        assert whole.keys() == {f"model.{name}" for name in full}
        assert all(same(tensor, full[name.removeprefix("model.")]) for name, tensor in whole.items())


def test_a_folder_that_cannot_be_made_is_an_error_not_a_silence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointException, match="Not a directory"):
        save(tmp_path / "file")


def test_no_rank_makes_the_folder_before_all_have_plans(tmp_path):
    """Until then the first rank may be deleting what a failed save left, and a folder that vanishes fails the save."""
    writer = HDF5Writer(tmp_path / "step-1", step=1)
    assert writer.prepare_local_plan(SavePlan([])) == SavePlan([])
    assert os.listdir(tmp_path) == []


def test_hostile_names_of_folders_are_just_names(tmp_path):
    folder = tmp_path / 'it\'s a "run" $(id) %j 日本'
    assert newest_sound(save(folder).parent) == 1
    assert os.listdir(tmp_path) == [Path(folder).name]


def test_an_attempt_that_was_superseded_touches_no_snapshot_of_the_later_one(tmp_path):
    path = save(tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CheckpointException, match="a later attempt has taken over"):
        save(tmp_path, superseded=lambda: True)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_an_attempt_that_is_superseded_while_it_writes_makes_no_snapshot(tmp_path):
    answers = iter([False, False, True])
    with pytest.raises(CheckpointException, match="a later attempt has taken over"):
        save(tmp_path, superseded=lambda: next(answers))
    assert whole_snapshots(tmp_path) == []
