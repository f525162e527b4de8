"""The directory in which data are built: one builder at a time, whatever others do at that moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from specbatch.corpus.cache import put_in_place, unfinished


def build(place: Path, moment: Callable[[Path], None] = lambda folder: None) -> bytes:
    """Build a directory as a preparation does, in which nobody else may write. Returns what is found in it."""
    with unfinished(place) as folder:
        (folder / "part.json").unlink(missing_ok=True)
        with (folder / "ids.bin").open("xb") as ids:
            ids.write(bytes(range(100)))
        moment(folder)
        assert [path.name for path in folder.glob("*.*")] == ["ids.bin"]
        (folder / "part.json").write_text("{}")
        put_in_place(folder, place)
    return (place / "ids.bin").read_bytes()


def test_who_comes_while_a_result_is_put_in_place_has_a_directory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rename, folders = tmp_path / "key", Path.rename, []
    with ExitStack() as others:

        def come_between(folder: Path, target: Path) -> Path:
            folders.extend((folder, others.enter_context(unfinished(place))))
            moved = rename(folder, target)
            folders.append(others.enter_context(unfinished(place)))
            return moved

        monkeypatch.setattr(Path, "rename", come_between)
        build(place)
        monkeypatch.undo()
        # This one comes when the lock has been given back, and builds what is left unused.
        folders.append(others.enter_context(unfinished(place)))
        assert len(set(folders[:3])) == len(set(folders[1:])) == 3
        assert all(folder.is_dir() and not any(folder.iterdir()) for folder in folders[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_an_interrupted_directory_is_gone_on_with_by_one_alone(tmp_path: Path) -> None:
    place = tmp_path / "key"
    with unfinished(place) as first:
        (first / "progress.json").write_text("{}")
    with unfinished(place) as again, unfinished(place) as other:
        assert (again, list(other.iterdir())) == (first, [])
        assert (again / "progress.json").exists()


def test_many_that_build_the_same_at_once_all_find_the_whole_result(tmp_path: Path) -> None:
    failures: list[Exception] = []

    def work() -> None:
        try:
            for number in range(60):
                assert build(tmp_path / f"{number}") == bytes(range(100))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(str(number) for number in range(60))
