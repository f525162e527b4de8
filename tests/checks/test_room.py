"""The store has room for the largest step, once it is known how large that is."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from specbatch.checks import check_plan
from specbatch.config import Config
from specbatch.config.rules import Bytes
from specbatch.corpus import corpus_of, make_plan, prepare, try_first_rows
from specbatch.drafts.base import algorithm_of
from specbatch.errors import UserError
from specbatch.room import check_first, check_store
from specbatch.target import read_target


def refused_until_as_large_as_it_says(check: Callable[[], object], config: Config, message: str) -> None:
    """Check that a store is refused, and that one of the size which the message names is accepted."""
    with pytest.raises(UserError, match=message) as caught:
        check()
    config.store.bytes_per_rank = Bytes.parse(str(caught.value).split("set store.bytes_per_rank: ")[1].split(",")[0])
    check()


def test_held_out_packs_fit_into_the_store_beside_any_step(load, tmp_path):
    for name in ("train", "heldout"):
        rows = [{"text": f"{name} {i} the licence of the work, and nothing else " * 40} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["--data.loss_on=all", "--training.packs_per_step=8", "--training.warmup_steps=0"]
    config = load(*common, "--training.evaluate_interval_steps=50")
    corpus = corpus_of(prepare(config))
    algorithm = algorithm_of(config, read_target(config.target.path))
    plan = make_plan(config, corpus)
    size = sum(algorithm.contract.bytes(corpus.sample(i).loss_mask) for pack in plan.heldout for i in pack.samples)
    config.store.bytes_per_rank = Bytes(int(size / 0.85))
    refused_until_as_large_as_it_says(
        lambda: check_plan(config, plan, corpus, algorithm),
        config,
        r"training\.evaluate_packs: 16 take .* besides any step, and step 1 takes",
    )


def test_once_the_corpus_is_known_the_largest_step_must_fit_to_the_byte(load, tmp_path):
    rows = [{"text": f"{i} the licence of the work, and nothing else " * 40} for i in range(90)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ["--data.heldout=[]", "--evaluate.prompts=0", "--data.loss_on=all", "--training.tokens_per_pack=256"]
    config = load(*common, "--training.packs_per_step=64", "--training.warmup_steps=5")
    corpus = corpus_of(prepare(config))
    algorithm = algorithm_of(config, read_target(config.target.path))
    plan = make_plan(config, corpus)
    assert int(corpus.lengths.min()) > 200
    (warning,) = check_plan(config, plan, corpus, algorithm)
    assert warning.startswith("training.warmup_steps: 5: the run has only 2 steps")

    needed = sum(algorithm.contract.bytes(corpus.sample(i).loss_mask) for pack in plan.packs(1) for i in pack.samples)
    config = load(*common, "--training.packs_per_step=90", "--training.ranks=1", "--store.bytes_per_rank=16MiB")
    plan = make_plan(config, corpus)
    whole = sum(algorithm.contract.bytes(corpus.sample(i).loss_mask) for i in range(len(corpus)))
    assert needed < 0.85 * (16 << 20) < 1.5 * whole
    config.store.bytes_per_rank = Bytes(int(whole / 0.85) + 2)
    check_store(config, plan, corpus, algorithm)
    config.store.bytes_per_rank = Bytes(int(whole / 0.85) - 2)
    refused_until_as_large_as_it_says(
        lambda: check_store(config, plan, corpus, algorithm),
        config,
        r"store\.bytes_per_rank: .* of training\.ranks: 1 hold .*step 1 take .*; set",
    )


def test_once_the_corpus_is_known_the_largest_object_must_fit_into_one_rank(load, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "the licence of the work " * 40}))
    config = load("--data.heldout=[]", "--evaluate.prompts=0", "--data.loss_on=all", "--training.ranks=8")
    corpus = corpus_of(prepare(config))
    algorithm = algorithm_of(config, read_target(config.target.path))
    check_store(config, make_plan(config, corpus), corpus, algorithm)
    config.store.bytes_per_rank = Bytes(90_000)
    with pytest.raises(UserError, match=r"can't hold objects of more than .* but a sample of \d+ tokens needs one of"):
        check_store(config, make_plan(config, corpus), corpus, algorithm)


def test_a_store_smaller_than_a_step_is_refused_once_the_first_rows_are_known(load, tmp_path):
    def rows(count: int) -> str:
        words = " ".join(f"word{i}" for i in range(30))
        row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": words}]}
        return (json.dumps(row) + "\n") * count

    def tried(config: Config) -> None:
        assert try_first_rows(config, lambda corpus, whole: check_first(config, corpus, whole)).warnings == []

    # Each sample has about 200 tokens of 512 bytes: 16 MiB hold 140.
    (tmp_path / "train.jsonl").write_text(rows(150))
    small = load("--data.heldout=[]", "--evaluate.prompts=0", "--training.packs_per_step=60")
    tried(small)
    large = load("--data.heldout=[]", "--evaluate.prompts=0", "--training.packs_per_step=120")
    for count in (300, 2000):
        (tmp_path / "train.jsonl").write_text(rows(count))
        tried(small)
        with pytest.raises(UserError, match=r"store\.bytes_per_rank: 16MiB of training\.ranks: 1 hold .* step 1"):
            tried(large)
