"""A run on this machine has enough GPUs and memory."""

from __future__ import annotations

from specbatch.checks import check
from specbatch.checks.machine import visible_gpus
from tests.checks.messages import refused


def test_more_gpus_than_there_are_is_refused_and_the_count_is_of_those_that_may_be_used(load, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,7")
    assert visible_gpus() == 3
    assert check(load("--training.ranks=2")) == []
    assert refused(load("--training.ranks=2", "--inference.engines=2")) == (
        "training.ranks: 2 and inference.engines: 2 of inference.tensor_parallel: 1 need 4 GPUs, but this machine has "
        "3; try training.ranks: 2 and inference.engines: 1"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_gpus() == 0


def test_memory_that_may_not_do_is_warned_of_before_the_corpus_is_known(load):
    (warning,) = check(load("--training.packs_per_step=64"))
    assert warning.startswith("store.bytes_per_rank: 16MiB of training.ranks: 1 hold 13.6 MiB, and a full step ")
    assert "is up to 16.0 MiB" in warning
    (warning,) = check(load("--store.bytes_per_rank=100TiB"))
    assert "are more than this machine's memory of" in warning
