"""Ranks share packs evenly, and their GPUs have room for what they train."""

from __future__ import annotations

import pytest

from specbatch.checks import check
from specbatch.drafts.base import algorithm_of
from specbatch.errors import UserError
from specbatch.target import read_target
from specbatch.training.preflight import RESERVE_BYTES


def test_ranks_that_train_packs_together_divide_ranks_and_packs(load) -> None:
    with pytest.raises(UserError, match=r"training\.context_parallel: 2 does not divide training\.ranks: 3"):
        check(load("--training.ranks=3", "--training.context_parallel=2", "--training.packs_per_step=6"))
    with pytest.raises(UserError, match=r"training\.packs_per_step: 3 .* train a pack together; try 2 or 4"):
        check(load("--training.ranks=4", "--training.context_parallel=2", "--training.packs_per_step=3"))
    check(load("--training.ranks=4", "--training.context_parallel=4", "--training.packs_per_step=3"))


def test_a_gpu_that_is_too_small_is_told_with_both_numbers_and_a_remedy(load) -> None:
    check(load("--training.gpu_memory=80GiB"))
    with pytest.raises(UserError, match=r"training\.gpu_memory: .* needs .* training\.recompute: all"):
        check(load("--training.gpu_memory=1GiB"))


def test_a_gpu_has_room_for_all_that_is_trained(load) -> None:
    """An embedding of its own included; a head that is not trained needs less."""
    needed = sum(algorithm_of(load(), read_target(load().target.path)).memory().values())
    room = f"--training.gpu_memory={needed + RESERVE_BYTES}"
    check(load(room))
    with pytest.raises(UserError, match=r"training\.gpu_memory"):
        check(load(room, "--draft.train_embedding=true"))
    check(load(f"--training.gpu_memory={needed + RESERVE_BYTES - 1000}", "--draft.train_head=false"))
