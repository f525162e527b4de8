"""Held-out data are no training data."""

from __future__ import annotations

from specbatch.checks import check
from tests.checks.messages import refused


def test_held_out_data_that_are_training_data_by_another_way_are_refused(load, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "train.jsonl").write_text("")
    (tmp_path / "heldout.jsonl").symlink_to(tmp_path / "all" / "train.jsonl")
    for train in ("all", "all/train.jsonl", "./all/../all/train.jsonl"):
        message = refused(load(f"--data.train={tmp_path / train}"))
        assert message.startswith(f"data.heldout: {tmp_path / 'heldout.jsonl'} is in data.train, too")
    (tmp_path / "all" / ".part").mkdir()
    (tmp_path / "all" / ".part" / "kept.jsonl").write_text("")
    apart = load(f"--data.train={tmp_path / 'all'}", f"--data.heldout={tmp_path / 'all' / '.part' / 'kept.jsonl'}")
    assert check(apart) == []
