import json

import pytest
import torch
import torch.distributed.checkpoint as dcp

from specbatch.cli import main
from specbatch.errors import UserError
from specbatch.snapshot.inspect import inspect
from specbatch.snapshot.storage import HDF5Writer


@pytest.fixture
def run(tmp_path):
    """A run with snapshots of steps 2 and 10."""
    state = {
        "w": torch.arange(1000.0).view(10, 100),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "one": torch.tensor(7),
    }
    for step in (10, 2):
        writer = HDF5Writer(tmp_path / "snapshots" / f"step-{step}", step=step, facts={"plan": {"seed": 0}})
        dcp.save({**state, "position": step}, storage_writer=writer, no_dist=True)
    (tmp_path / "config.yaml").write_text("")
    return tmp_path


def flip(path, values):
    """Change a bit of stored values."""
    data = bytearray(path.read_bytes())
    data[data.index(values.numpy().tobytes())] ^= 1
    path.write_bytes(data)


def test_a_snapshot_and_its_file_are_told_alike(run):
    (snapshot,) = inspect(run / "snapshots" / "step-2")
    (file,) = inspect(run / "snapshots" / "step-2" / "rank-0.h5")
    assert (snapshot.kind, snapshot.about["step"], snapshot.about["values"]) == ("snapshot", 2, {"position": 2})
    assert file.kind == "snapshot file"
    assert sorted(file.tensors, key=str) == sorted(snapshot.tensors, key=str)
    assert {(t.name, t.dtype, tuple(t.shape), t.bytes) for t in file.tensors} == {
        ("w", "float32", (10, 100), 4000), ("half", "bfloat16", (3,), 6), ("one", "int64", (), 8),
    }  # fmt: skip
    assert snapshot.damage == file.damage == []


def test_a_run_is_all_its_snapshots_in_order_of_steps(run, capsys):
    assert main(["inspect", str(run)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [words.split(":")[0].rsplit("/", 1)[1] for words in told] == ["step-2", "step-10"]
    assert all(words.endswith(": whole") for words in told)


def test_damage_is_told_by_name_and_is_the_exit_code(run, capsys):
    file = run / "snapshots" / "step-10" / "rank-0.h5"
    flip(file, torch.arange(1000.0))
    for path in (file, file.parent, run):
        assert main(["inspect", str(path), "--json"]) == 1
        (damaged,) = (one for one in json.loads(capsys.readouterr().out) if one["damage"])
        assert len(damaged["damage"]) == 1
        assert "w is not what was written: its checksum differs" in damaged["damage"][0]
    assert main(["inspect", str(file.parent)]) == 1
    assert "1 DAMAGED" in capsys.readouterr().out


def test_a_file_that_was_cut_off_is_told_and_not_raised(run):
    file = run / "snapshots" / "step-2" / "rank-0.h5"
    file.write_bytes(file.read_bytes()[:1500])
    (found,) = inspect(file)
    assert found.kind == "unreadable"
    assert "can't be read" in found.damage[0]


def test_where_nothing_of_ours_is_the_user_is_told(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="there is no"):
            inspect(path)
