import msgspec
import pytest

from specbatch.snapshot.manifest import (
    FORMAT,
    MANIFEST,
    DamagedSnapshot,
    SnapshotManifest,
    differences,
    half_written,
    read_manifest,
    remove,
    set_aside,
    snapshot_path,
    snapshots,
    superfluous,
    whole_snapshots,
    write_manifest,
)


def snapshot(folder, step, **changes):
    path = snapshot_path(folder, step)
    path.mkdir(parents=True)
    (path / "rank-0.h5").write_bytes(b"12345")
    manifest = SnapshotManifest(FORMAT, "0", step, 1, {"lr": 1e-5}, {"rank-0.h5": 5}, {}, {"a": 0.1}, {"a": ("a", 0)})
    write_manifest(path, msgspec.structs.replace(manifest, **changes))
    return path


def test_a_manifest_comes_back(tmp_path):
    manifest = read_manifest(snapshot(tmp_path, 7))
    assert manifest.step == 7
    assert manifest.facts == {"lr": 1e-5}
    assert manifest.paths == {"a": ("a", 0)}


def test_steps_are_found_by_their_manifest_and_in_order_of_numbers(tmp_path):
    for step in (10, 9, 100):
        snapshot(tmp_path, step)
    (tmp_path / "step-11").mkdir()
    (tmp_path / "step-x").mkdir()
    assert snapshots(tmp_path) == whole_snapshots(tmp_path) == [9, 10, 100]
    assert half_written(tmp_path) == [tmp_path / "step-11"]
    assert whole_snapshots(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: (path / MANIFEST).unlink(), "never finished"),
        (lambda path: (path / MANIFEST).write_bytes(b""), "manifest.json can't be read"),
        (lambda path: (path / MANIFEST).write_bytes(b"\xff{}"), "manifest.json can't be read"),
        (lambda path: (path / "rank-0.h5").unlink(), "rank-0.h5 can't be read"),
        (lambda path: (path / "rank-0.h5").write_bytes(b"1234"), "rank-0.h5 has 4 bytes of 5"),
    ],
)
def test_damage_is_refused_by_the_name_of_the_file(tmp_path, damage, why):
    snapshot(tmp_path, 1)
    damage(snapshot(tmp_path, 2))
    with pytest.raises(DamagedSnapshot, match=why):
        read_manifest(tmp_path / "step-2")
    assert whole_snapshots(tmp_path) == [1]


def test_every_flipped_bit_of_a_manifest_is_seen_or_harmless(tmp_path):
    path = snapshot(tmp_path, 1) / MANIFEST
    good, before = path.read_bytes(), read_manifest(path.parent)
    for position in range(len(good)):
        for bit in (0, 5):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :])
            try:
                after = read_manifest(path.parent)
            except DamagedSnapshot:
                continue
            assert after == before


@pytest.mark.parametrize("changes", [{"format": 2}, {"files": {"../../secret": 5}}])
def test_what_this_version_cannot_have_written_is_refused(tmp_path, changes):
    with pytest.raises(DamagedSnapshot):
        read_manifest(snapshot(tmp_path, 1, **changes))


def test_the_newest_whole_ones_are_kept_and_what_is_older_is_superfluous(tmp_path):
    for step in (1, 2, 3, 4, 5):
        snapshot(tmp_path, step)
    (tmp_path / "step-2" / "rank-0.h5").unlink()
    (tmp_path / "step-5" / "rank-0.h5").unlink()
    (tmp_path / "step-6").mkdir()
    assert superfluous(tmp_path, keep=2) == [tmp_path / "step-1", tmp_path / "step-2"]
    assert superfluous(tmp_path, keep=7) == []


def test_the_best_of_the_whole_ones_is_kept_besides_the_newest(tmp_path):
    for step in (1, 2, 3, 4, 5):
        snapshot(tmp_path, step)
    (tmp_path / "step-1" / "rank-0.h5").unlink()
    assert superfluous(tmp_path, keep=2, best=min) == [tmp_path / "step-1", tmp_path / "step-3"]
    assert superfluous(tmp_path, keep=2, best=lambda steps: None) == [tmp_path / f"step-{n}" for n in (1, 2, 3)]


def test_a_refused_snapshot_is_found_no_more_and_goes_with_the_next_pruning(tmp_path):
    snapshot(tmp_path, 1)
    set_aside(snapshot(tmp_path, 2))
    set_aside(snapshot(tmp_path, 2))
    assert snapshots(tmp_path) == [1]
    assert superfluous(tmp_path, keep=1) == [tmp_path / "refused-step-2"]


def test_removing_twice_is_no_error(tmp_path):
    path = snapshot(tmp_path, 1)
    remove(path)
    remove(path)
    assert not path.exists()


def test_differences_name_the_leaves():
    saved = {"plan": {"seed": 0, "epochs": 1}, "betas": [0.9, 0.95], "gone": None}
    current = {"plan": {"seed": 1, "epochs": 1}, "betas": (0.9, 0.95), "new": {"x": 3}}
    assert differences(saved, current) == [
        "plan.seed was 0 and is 1",
        "gone was None and is not there",
        "new.x was not there and is 3",
    ]
    assert differences(saved, saved) == []
