"""Stored samples are read back unchanged, whether or not writing was interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specbatch.corpus.samples import Converted
from specbatch.corpus.stored import StoredSamples, mask_of, spans_of
from specbatch.corpus.write import PartWriter

masks = st.lists(st.booleans(), min_size=1, max_size=12)


@given(masks)
def test_a_mask_is_its_runs(mask: list[bool]) -> None:
    spans = spans_of(np.array(mask))
    assert mask_of(spans, len(mask)).tolist() == mask
    assert (spans[1:, 0] > spans[:-1, 1]).all()


def rows_of(every: Sequence[list[bool]]) -> list[Converted]:
    """A row for each mask: two samples, or none and a reason."""
    rows = []
    for number, mask in enumerate(every, 1):
        row = Converted(f"a:b.jsonl:{number}")
        ids = np.arange(len(mask), dtype=np.int32) * number % 50
        if number % 3:
            row.samples = [(ids, np.array(mask)), (ids[::-1].copy(), np.array(mask))]
            row.prompt = ids
        else:
            row.rejected, row.warnings = [("no", f"{number}")], ["careful"]
        rows.append(row)
    return rows


@settings(deadline=None, max_examples=25)  # files are brought to disk
@given(st.lists(masks, max_size=8), st.integers(0, 8))
def test_a_writer_that_goes_on_makes_what_one_makes_that_was_not_broken_off(every: list[list[bool]], at: int) -> None:
    rows = rows_of(every)
    with TemporaryDirectory() as first, TemporaryDirectory() as second:
        with PartWriter(Path(first), 50) as whole:
            whole.add(rows)
        cut = PartWriter(Path(second), 50)
        cut.add(rows[:at])
        cut.keep()
        cut.add(rows[at : at + 1])  # lost
        cut.close()
        with PartWriter(Path(second), 50) as rest:
            rest.add(rows[rest.part.rows :])
        whole.part.path = rest.part.path = ""
        assert whole.part == rest.part
        files = [{p.name: p.read_bytes() for p in Path(folder).iterdir()} for folder in (first, second)]
        assert files[0] == files[1]
        found = StoredSamples(Path(first))
        samples = [sample for row in rows for sample in row.samples]
        assert len(found) == len(samples) == whole.part.samples
        for i, (ids, mask) in enumerate(samples):
            assert found.tokens(i).tolist() == ids.tolist()
            assert found.mask(i).tolist() == mask.tolist()
        assert found.rows.tolist() == [int(row.place.split(":")[-1]) for row in rows for _ in row.samples]
        assert found.prompts() == [row.prompt.tolist() for row in rows if row.prompt is not None]
        expected = np.zeros(50, dtype=int)
        for ids, mask in samples:
            np.add.at(expected, ids[mask], 1)
        assert found.counts.tolist() == expected.tolist()
