"""Any number of processes turns rows into the same samples, or ends with an error."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from specbatch.corpus.convert import Conversion
from specbatch.corpus.samples import Converted
from specbatch.corpus.tokenizer import load_tokenizer, tokenizer_size
from specbatch.errors import RunError, UserError
from tests.corpus.rows import Settings, lines
from tests.corpus.test_mask import talk


def _same(a: list[Converted], b: list[Converted]) -> None:
    assert [row.place for row in a] == [row.place for row in b]
    assert [row.rejected for row in a] == [row.rejected for row in b]
    flat = [[array.tobytes() for row in rows for sample in row.samples for array in sample] for rows in (a, b)]
    assert flat[0] == flat[1]


@pytest.mark.light
def test_any_number_of_processes_gives_the_same_samples_in_the_same_order(settings: Settings) -> None:
    config = settings({})
    rows = [(f"f:{i}", lines(talk("Hi", f"Answer {i}.")) if i % 7 else b"bad") for i in range(400)]

    def converted(workers: int) -> list[Converted]:
        with Conversion(config, len(rows), prompts=False, workers=workers) as conversion:
            assert conversion.tokenizer_size == tokenizer_size(load_tokenizer(config))
            return [row for batch in conversion.batches(iter(rows)) for row in batch]

    _same(converted(1), converted(4))


@pytest.mark.light
def test_a_killed_process_of_the_preparation_ends_it_with_an_error(settings: Settings, target_copy: Path) -> None:
    config = settings({}, target=target_copy)
    rows = ((f"f:{i}", lines(talk("Hi", f"Answer {i}."))) for i in range(100_000))
    others = set(multiprocessing.active_children())
    with Conversion(config, 100_000, prompts=False, workers=2) as conversion:
        batches = conversion.batches(rows)
        next(batches)
        (set(multiprocessing.active_children()) - others).pop().kill()
        with pytest.raises(RunError, match=r"was killed.*data\.workers"):
            list(batches)
    for path in target_copy.glob("tokenizer*"):
        path.unlink()
    with (
        Conversion(config, 100_000, prompts=False, workers=2) as conversion,
        pytest.raises(UserError, match=r"target\.path: the tokenizer in "),
    ):
        list(conversion.batches(rows))


@pytest.mark.light
def test_a_transform_in_another_process_has_all_of_transformers(settings: Settings, tmp_path: Path) -> None:
    code = (
        "def mine(row):\n"
        "    import torch, transformers\n"
        "    assert issubclass(transformers.PreTrainedModel, torch.nn.Module)\n"
        "    return row\n"
    )
    (tmp_path / "mine.py").write_text(code)
    config = settings({}, transform=f"{tmp_path / 'mine.py'}:mine")
    with Conversion(config, 2, prompts=False, workers=2) as conversion:
        ((row,),) = conversion.batches(iter([("f:1", lines(talk("Hi", "Hello.")))]))
    assert (len(row.samples), row.rejected) == (1, [])
