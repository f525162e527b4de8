"""The place of a pack's rows in memory, and the tensors that the draft gets."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from specbatch.drafts.eagle3.contract import Eagle3Contract
from specbatch.plan import Pack
from specbatch.training.feed.buffers import PackRows, empty_pack, make_buffers, only
from tests.training.test_steps import PaperCorpus

CONTRACT = Eagle3Contract((0, 1, 2), hidden=4)
PACK = Pack(0, 0, (3, 0, 5))


def test_every_sample_has_a_place_of_its_own_and_is_seen_in_the_packs_order() -> None:
    corpus = PaperCorpus(6)
    rows = PackRows.of(PACK, corpus, CONTRACT)
    _memory, buffers = make_buffers(2, 24, CONTRACT.widths, pinned=False)
    destinations, _ = buffers[1].place(rows, CONTRACT.widths)
    assert [(d.sample, d.tensor, d.rows) for d in destinations] == list(rows.rows)
    for number, where in enumerate(destinations):
        values = torch.full((where.rows, CONTRACT.widths[where.tensor]), float(number), dtype=torch.bfloat16)
        ctypes.memmove(where.pointer, values.data_ptr(), values.nbytes)
    _, views = buffers[1].place(rows, CONTRACT.widths)
    for tensor, width in CONTRACT.widths.items():
        expected = [n for n, d in enumerate(destinations) if d.tensor == tensor for _ in range(d.rows)]
        assert views[tensor].shape == (len(expected), width)
        assert views[tensor][:, 0].tolist() == views[tensor][:, -1].tolist() == expected


def test_a_part_of_a_pack_says_what_it_wants_of_each_sample_and_is_found_where_the_whole_would_be() -> None:
    rows = PackRows.of(PACK, PaperCorpus(6), CONTRACT)
    _memory, [buffer] = make_buffers(1, 24, CONTRACT.widths, pinned=False)
    part = {"aux": torch.tensor([1, 2, 5, 6, 7]), "last": torch.tensor([], dtype=torch.int64)}
    destinations, views = buffer.place(rows, CONTRACT.widths, part)
    whole, _ = buffer.place(rows, CONTRACT.widths)
    assert [d.pointer for d in destinations] == [d.pointer for d in whole]
    assert [count for _, tensor, count in rows.rows if tensor == "aux"] == [5, 2, 7]
    assert [d.wanted for d in destinations] == [((1, 3),), ((0, 2),), ((0, 1),), (), (), ()]
    views["aux"][:, 0] = torch.arange(14)
    found = only(views, part)
    assert [run[:, 0].tolist() for run in found["aux"]] == [[1, 2], [5, 6, 7]]
    assert sum(map(len, found["last"])) == 0
    assert [len(run) for runs in only(views, None).values() for run in runs] == [14, rows.count("last")]


def test_the_longest_pack_fits() -> None:
    corpus = PaperCorpus(6)
    rows = PackRows.of(PACK, corpus, CONTRACT)
    tokens = int(corpus.lengths[list(PACK.samples)].sum())
    memory, [buffer] = make_buffers(1, tokens, CONTRACT.widths, pinned=False)
    destinations, _ = buffer.place(rows, CONTRACT.widths)
    end = max(d.pointer + 2 * d.rows * CONTRACT.widths[d.tensor] for d in destinations)
    assert memory.data_ptr() <= destinations[0].pointer
    assert end <= memory.data_ptr() + memory.nbytes


def test_tokens_and_masks_come_from_the_corpus() -> None:
    corpus = PaperCorpus(6)
    rows = PackRows.of(PACK, corpus, CONTRACT)
    assert rows.lengths == (7, 4, 9)
    assert rows.input_ids.tolist() == [*range(7), *range(4), *range(9)]
    assert rows.loss_mask.tolist() == [bool(x) for i in PACK.samples for x in corpus.sample(i).loss_mask]
    assert rows.input_ids.dtype == np.int64


def test_a_void_pack_has_tensors_without_rows() -> None:
    empty = empty_pack(CONTRACT, torch.device("cpu"))
    assert empty.input_ids.shape == empty.loss_mask.shape == (0,)
    assert empty.rows["aux"].shape == (0, 12)
    assert empty.rows["last"].shape == (0, 4)
    assert empty.lengths == ()


def test_a_pack_without_samples_has_no_rows() -> None:
    rows = PackRows.of(Pack(0, 9, ()), PaperCorpus(6), CONTRACT)
    assert rows.rows == rows.lengths == ()
    assert rows.input_ids.size == 0
