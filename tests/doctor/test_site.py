"""Checks of a node: each one on this machine as it is, and with something broken."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from specbatch.config import load_config
from specbatch.doctor import site
from specbatch.doctor.finding import Finding, guarded
from specbatch.doctor.site import NODE, QUICK, CheckTask

TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, how are you?"}]}


@pytest.fixture
def place(tmp_path: Path, tiny_target: Path) -> CheckTask:
    """A training task of Slurm's, without GPUs."""
    (tmp_path / "a.jsonl").write_text(json.dumps(TALK) + "\n")
    (tmp_path / "config.yaml").write_text(
        f"run: {{dir: '{tmp_path}'}}\ntarget: {{path: '{tiny_target}'}}\ndata: {{train: [{tmp_path}/a.jsonl]}}\n"
        "draft: {vocab_size: 64}\nstore: {bytes_per_rank: 64MiB}\n"
    )
    return CheckTask(load_config(tmp_path / "config.yaml"), "training", tmp_path, others=("node2",))


def found(check: Callable[[CheckTask], Finding], place: CheckTask, *overrides: str) -> Finding:
    """Return a check's finding with these settings."""
    config = load_config(place.root / "config.yaml", list(overrides))
    (finding,) = guarded("check", lambda: check(dataclasses.replace(place, config=config)))
    return finding


@pytest.mark.parametrize(("name", "check"), [*QUICK, *NODE])
def test_all_is_well_on_this_machine(place: CheckTask, name: str, check: Callable[[CheckTask], Finding]):
    finding = found(check, place)
    assert finding.verdict == "ok", finding
    assert finding.found


def test_an_interface_that_is_not_there_is_named_with_those_that_are(place: CheckTask):
    finding = found(site.interface, place, "--slurm.interface=hsn9")
    assert finding.verdict == "failed"
    assert "has no address on hsn9; it has " in finding.found


def packages_seen(place: CheckTask, folder: Path, requires: list[str], left_out: str = "no package") -> Finding:
    """The finding of a Python that has the packages of this one, but some, with these requirements of specbatch."""
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith((left_out, "specbatch")):
            (folder / entry.name).symlink_to(entry)
    metadata = folder / f"specbatch-{importlib.metadata.version('specbatch')}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: specbatch", "Version: 0", *(f"Requires-Dist: {name}" for name in requires)]
    metadata.write_text("\n".join(lines) + "\n")
    points = importlib.metadata.distribution("specbatch").read_text("entry_points.txt")
    (metadata.parent / "entry_points.txt").write_text(points or "")
    code = (
        "import sys, msgspec; from pathlib import Path; from specbatch.config import load_config; "
        "from specbatch.doctor import site; root = Path(sys.argv[1]); "
        "place = site.CheckTask(load_config(root / 'config.yaml'), 'training', root); "
        "print(msgspec.json.encode(site.packages(place)).decode())"
    )
    path = os.pathsep.join([str(folder), str(Path(site.__file__).parents[2])])
    argv = [sys.executable, "-S", "-c", code, str(place.root)]
    done = subprocess.run(argv, env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True, text=True)
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Finding)


def test_packages_that_are_missing_or_others_are_named_with_the_command(place: CheckTask, tmp_path: Path):
    real = importlib.metadata.requires("specbatch") or []
    finding = packages_seen(place, tmp_path / "without", real, left_out="torchtitan")
    assert finding.verdict == "failed"
    assert finding.found == f"{sys.executable}: torchtitan is missing"
    assert f"{sys.executable} -m pip install 'specbatch[training]'" in finding.remedy
    # What the component may do without, or has in another version, is no reason to stop: images are made by others.
    finding = packages_seen(place, tmp_path / "others", [*real, "numpy<1", "no-such-package>=1"])
    assert finding.verdict == "warning"
    assert "(tested: <1), no-such-package is missing" in finding.found
    # What others need is no affair of this component.
    assert packages_seen(place, tmp_path / "theirs", ["sglang==0; extra == 'inference'"]).verdict == "ok"


def test_a_directory_that_is_not_seen_is_no_run_directory(place: CheckTask, tmp_path: Path):
    elsewhere = dataclasses.replace(place, root=tmp_path / "elsewhere")
    assert "does not see" in site.run_directory(elsewhere).found
    assert site.run_directory(elsewhere).verdict == "failed"


def test_a_directory_that_takes_no_file_is_said(place: CheckTask):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        root = Path(folder)
        (root / "config.yaml").touch()
        root.chmod(0o555)
        (finding,) = as_nobody(lambda: [site.run_directory(dataclasses.replace(place, root=root))])
        root.chmod(0o755)
    assert finding.verdict == "failed"
    assert f"can't write in {folder}: Permission denied" in finding.found


def test_a_node_without_the_place_for_a_copy_of_the_target_is_said(place: CheckTask):
    engine = dataclasses.replace(place, component="inference")
    assert "room for " in found(site.copy_of_target, engine, "--slurm.stage_target=/dev/shm").found
    finding = found(site.copy_of_target, engine, "--slurm.stage_target=/no/disk")
    assert finding.verdict == "failed"
    assert "slurm.stage_target: /no/disk can't be used on " in finding.found


def test_a_target_that_is_not_there_or_not_readable_is_said(place: CheckTask, tiny_target: Path):
    assert "there is no directory" in found(site.target, place, "--target.path=/no/target").found
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        root = Path(folder)
        root.chmod(0o755)
        shutil.copytree(tiny_target, root / "tiny")
        (root / "tiny").chmod(0o755)
        (root / "tiny" / "model.safetensors").chmod(0o600 if os.getuid() == 0 else 0)
        config = load_config(place.root / "config.yaml", [f"--target.path={root}/tiny"])
        there = dataclasses.replace(place, config=config)
        (finding,) = as_nobody(lambda: guarded("target", lambda: site.target(there)))
    assert finding.verdict == "failed"
    assert f"no permission to read {folder}/tiny/model.safetensors" in finding.found


def as_nobody(check: Callable[[], list[Finding]]) -> list[Finding]:
    """Return the finding for a user without files, since root may read everything."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path = Path(folder) / "found.json"
        path.touch()
        if (child := os.fork()) == 0:
            with path.open("wb") as file:
                if os.getuid() == 0:
                    os.setresuid(65534, 65534, 65534)
                file.write(msgspec.json.encode(check()))
            os._exit(0)
        os.waitpid(child, 0)
        return msgspec.json.decode(path.read_bytes(), type=list[Finding])


def test_data_that_are_not_there_are_said(place: CheckTask):
    assert "no such file" in found(site.data, place, "--data.train=[/no/talks.jsonl]").found


@contextlib.contextmanager
def small_tmpfs(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root mounts")
def test_shared_memory_that_is_full_is_said(place: CheckTask, tmp_path: Path):
    with small_tmpfs(tmp_path / "shm"):
        finding = site.shared_memory(place, tmp_path / "shm")
    assert finding.verdict == "failed"
    assert finding.expected == "64.0 MiB, 64.0 MiB per rank"


def test_memory_that_the_store_is_too_large_for_is_said(place: CheckTask):
    finding = found(site.memory, place, "--store.bytes_per_rank=900TiB")
    assert finding.verdict == "failed"
    assert "slurm.training.mem" in finding.remedy


def test_a_node_needs_its_part_of_the_gpus_of_an_engine(place: CheckTask):
    words = ["--inference.tensor_parallel=16", "--slurm.inference.gpus_per_node=8", "--slurm.inference.nodes=2"]
    config = load_config(place.root / "config.yaml", words)
    assert dataclasses.replace(place, config=config, component="inference").gpus_needed == 8


def test_gpus_that_were_asked_for_and_are_not_there_are_said(place: CheckTask, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(site, "DEVICE_NODES", ("/no/device*",))
    finding = found(site.gpus, place, "--slurm.training.gpus_per_node=4", "--training.ranks=4")
    assert finding.verdict == "failed"
    assert "has no device file of a GPU" in finding.found
    assert finding.expected == "4 for this task"
    # Where all is done on this machine, CPUs do what no GPU does.
    here = dataclasses.replace(place, slurm=False)
    assert found(site.gpus, here, "--slurm.training.gpus_per_node=4").verdict == "ok"


def test_each_task_sees_its_own_gpus(place: CheckTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    real = glob.glob
    there = [f"/dev/nvidia{number}" for number in range(4)]
    monkeypatch.setattr(glob, "glob", lambda pattern: there if pattern.startswith("/dev/nvidia") else real(pattern))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    settings = ["--slurm.inference.gpus_per_node=4", "--inference.tensor_parallel=2", "--inference.engines=2"]
    engine = dataclasses.replace(place, component="inference", task=1, local=1)
    assert found(site.gpus, engine, *settings).found.startswith("2,3 of 4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "needs 2 GPUs, but CUDA_VISIBLE_DEVICES lists 0" in found(site.gpus, engine, *settings).found
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found(site.compiler, engine, *settings).verdict == "failed"


def test_rdma_devices_that_are_not_there_are_said(place: CheckTask):
    finding = found(site.store_protocol, place, "--store.protocol=rdma", "--store.devices=mlx5_99")
    assert finding.verdict == "failed"
    assert "store.devices: mlx5_99: this node has " in finding.found


def test_checks_that_break_are_findings_and_keep_what_was_found_before(place: CheckTask):
    def broken() -> Iterator[Finding]:
        yield Finding("a", "b")
        raise ZeroDivisionError("x")

    assert guarded("c", broken) == [Finding("a", "b"), Finding("c", "ZeroDivisionError: x", verdict="failed")]
