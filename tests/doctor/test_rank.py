"""What the doctor's ranks say where training would break: no interface, wrong sums, snapshots that can't be written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from specbatch.config import load_config
from specbatch.doctor import rank
from specbatch.doctor.finding import Finding
from specbatch.doctor.ranks import ranks
from specbatch.doctor.site import CheckTask
from specbatch.doctor.trial import STEPS, make_trial
from specbatch.rundir import RunDir
from specbatch.snapshot.storage import HDF5Writer


@pytest.fixture
def place(tmp_path: Path, tiny_target: Path, request: pytest.FixtureRequest) -> CheckTask:
    """The doctor's directory, for one rank or as many as the test says."""
    path, count = tmp_path / "a.yaml", getattr(request, "param", 1)
    path.write_text(
        f"run: {{dir: '{tmp_path}/run'}}\ntarget: {{path: '{tiny_target}'}}\ndata: {{train: [a], max_tokens: 64}}\n"
        f"draft: {{vocab_size: 64}}\ntraining: {{ranks: {count}, threads: 1, tokens_per_pack: 64, packs_per_step: 2}}\n"
        "store: {bytes_per_rank: 64MiB}\n"
    )
    trial = make_trial(load_config(path), tmp_path / "doctor")
    (tmp_path / "doctor" / "findings").mkdir(exist_ok=True)
    return CheckTask(trial, "training", tmp_path / "doctor", slurm=False)


def of_first(place: CheckTask) -> dict[str, Finding]:
    """What its first rank finds."""
    found: dict[str, Finding] = {}
    for finding in ranks(place, "127.0.0.1"):
        found.setdefault(finding.what, finding)
    return found


@pytest.mark.light
@pytest.mark.parametrize("place", [2], indirect=True)
def test_ranks_that_do_not_meet_are_told_from_a_step_that_fails(place: CheckTask, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    found = of_first(place)
    assert found["attention"].verdict == "ok"
    assert found["all-reduce"].verdict == "failed"
    assert found["all-reduce"].found.startswith("ranks do not meet: ")
    assert found["all-reduce"].found.endswith("Unable to find address for: nosuch0")
    assert "set slurm.interface" in found["all-reduce"].remedy
    assert {found[what].verdict for what in ("training step", "snapshot")} == {"not checked"}


@pytest.mark.light
def test_a_directory_that_takes_no_snapshot_fails_the_training_step(place: CheckTask):
    RunDir(place.root).snapshots.write_text("in its place")
    found = of_first(place)
    assert found["training step"].verdict == "failed"
    assert f"could not be written to {place.root}/snapshots" in found["training step"].found
    assert found["snapshot"].verdict == "not checked"


def test_a_sum_to_which_a_rank_has_added_nothing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        watch = rank.RankMeasurements(torch.device("cpu"))
        watch.start(0)
        assert watch.reduced is None, "it is alone"
        monkeypatch.setattr(rank.dist, "get_world_size", lambda: 2)
        with pytest.raises(rank._WrongSum, match=r"^ones over 2 ranks add up to \[1.0\]$"):
            watch.start(0)
    finally:
        dist.destroy_process_group()


def test_a_snapshot_that_is_damaged_or_has_no_room_beside_it_is_said(place: CheckTask):
    run_dir = RunDir(place.root)
    path = run_dir.snapshots / f"step-{STEPS}"
    assert rank.snapshot(place.config, run_dir).verdict == "not checked"
    dcp.save({"w": torch.arange(1000.0)}, storage_writer=HDF5Writer(path, step=STEPS, facts={}), no_dist=True)
    assert rank.snapshot(place.config, run_dir).verdict == "ok"
    place.config.snapshot.keep = 1 << 40
    full = rank.snapshot(place.config, run_dir)
    assert (full.verdict, full.remedy) == ("failed", "make room, or set a smaller snapshot.keep or another run.dir")
    (path / "rank-0.h5").write_bytes((path / "rank-0.h5").read_bytes()[:-100])
    damaged = rank.snapshot(place.config, run_dir)
    assert (damaged.verdict, damaged.remedy) == ("failed", "use a run.dir on another file system")
    assert damaged.found.startswith(f"{path}: ")
