"""A run directory is new or empty, or a run whose snapshots are of the same draft."""

from __future__ import annotations

import pytest

from specbatch.checks import check
from specbatch.checks.run_dir import check_snapshot
from specbatch.drafts.base import algorithm_of
from specbatch.errors import UserError
from specbatch.rundir import RunDir
from specbatch.snapshot.manifest import FORMAT, MANIFEST, SnapshotManifest, snapshot_path, write_manifest
from specbatch.target import read_target
from tests.checks.messages import refused


def test_a_run_that_has_begun_is_not_begun_again(load, tmp_path):
    config = load()
    RunDir(tmp_path / "run").make()
    (tmp_path / "run" / "config.yaml").write_text("")
    assert check(config) == []
    (tmp_path / "run" / "attempts" / "1").mkdir(parents=True)
    root = tmp_path / "run"
    assert refused(config) == (
        f"run.dir: {root} exists already as a run; continue it with `specbatch resume {root}`, or give another run.dir"
    )


def test_a_directory_that_specbatch_has_not_made_is_no_run_directory(load, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    assert check(load()) == []
    (tmp_path / "run" / "cache" / "corpus").mkdir(parents=True)
    assert check(load(f"--data.cache_dir={tmp_path / 'run' / 'cache' / 'corpus'}")) == []
    (tmp_path / "run" / "cache" / "corpus").rmdir()
    (tmp_path / "run" / "cache").rmdir()
    for name in ("config.yaml", "notes.txt"):
        (tmp_path / "run" / name).write_text("mine")
        assert refused(load()).startswith(
            f"run.dir: {tmp_path / 'run'} has files that do not belong to a run (config.yaml"
        )
    monkeypatch.chdir(tmp_path)
    assert "has files that do not belong to a run (" in refused(load("--run.dir=."))
    assert check(load(), new_run=False) == []


def test_a_run_directory_that_is_a_file_is_refused(load, tmp_path):
    (tmp_path / "run").write_text("")
    assert refused(load()) == f"run.dir: {tmp_path / 'run'} is a file; give another path"


def test_snapshots_of_another_draft_are_refused_before_anything_starts(load, tmp_path):
    config = load("--draft.ttt_steps=3")
    algorithm = algorithm_of(config, read_target(config.target.path))
    for step, facts in ((1, {"algorithm": "dflash"}), (2, algorithm.facts())):
        snapshot_path(tmp_path, step).mkdir()
        write_manifest(
            snapshot_path(tmp_path, step), SnapshotManifest(FORMAT, "0", step, 1, {"draft": facts}, {}, {}, {}, {})
        )
    check_snapshot(tmp_path, algorithm)
    config = load("--draft.ttt_steps=4")
    with pytest.raises(UserError, match=r"step-2 belongs to another training: draft.ttt_steps was 3 and is 4"):
        check_snapshot(tmp_path, algorithm_of(config, read_target(config.target.path)))
    (snapshot_path(tmp_path, 2) / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"draft.algorithm: eagle3 can't continue from .*step-1, .* draft of dflash"):
        check_snapshot(tmp_path, algorithm)
