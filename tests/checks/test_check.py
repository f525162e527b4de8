"""Configurations that can't work are refused before anything starts, with both fields and a value that works."""

from __future__ import annotations

import pytest

from specbatch.checks import check
from tests.checks.messages import refused


def test_what_works_is_not_complained_about(load):
    assert check(load()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "--inference.tensor_parallel 3",
            "inference.tensor_parallel: 3 does not divide the target's 4 attention heads; try 2 or 4",
        ),
        (
            "--inference.tensor_parallel 8",
            "inference.tensor_parallel: 8 does not divide the target's 4 attention heads; try 4",
        ),
        (
            "--training.ranks 3",
            "training.packs_per_step: 8 can't be shared evenly by training.ranks: 3; try 6 or 9",
        ),
        (
            "--training.ranks 16",
            "training.packs_per_step: 8 can't be shared evenly by training.ranks: 16; try 16",
        ),
        (
            "--data.max_tokens 600",
            "training.tokens_per_pack: 512 is less than data.max_tokens: 600, so packs could not hold the longest "
            "samples; set training.tokens_per_pack: 600 or data.max_tokens: 512",
        ),
        (
            "--data.max_tokens 4096 --training.tokens_per_pack 4096",
            "data.max_tokens: 4096 is more than the target's 2048 positions; set data.max_tokens: 2048",
        ),
        (
            "--inference.sglang.context_length 200",
            "inference.sglang.context_length: 200 is too little for data.max_tokens: 256, since SGLang keeps 6 "
            "positions for itself; set at least 261, or remove it",
        ),
        (
            "--inference.sglang.context_length 4096",
            "inference.sglang.context_length: 4096 is more than the target's 2048 positions; set 2048, or remove it",
        ),
        (
            "--inference.sglang.max_total_tokens 100",
            "inference.sglang.max_total_tokens: 100 is less than data.max_tokens: 256, so the longest samples could "
            "not be computed; set at least 256",
        ),
        (
            "--draft.aux_layers [1,2,5]",
            "draft.aux_layers: 5 can't be read: of the target's 6 layers the last that can be is 4, since SGLang does "
            "not provide the last layer's output; leave it out for a low, a middle and a high one",
        ),
        ("--draft.aux_layers [2,1,3]", "draft.aux_layers: [2, 1, 3]: eagle3 reads three distinct layers in ascending"),
        ("--draft.aux_layers [1,1,3]", "draft.aux_layers: [1, 1, 3]: eagle3 reads three distinct layers in ascending"),
        ("--draft.aux_layers [1,3]", "draft.aux_layers: [1, 3]: eagle3 reads three distinct layers in ascending"),
        (
            "--draft.vocab_size 513",
            "draft.vocab_size: 513 is more than the target's 512 tokens; set draft.vocab_size: null for all of them",
        ),
        (
            "--data.heldout []",
            "evaluate.prompts: 40 come from data.heldout, which is empty; name files there, or ",
        ),
        ("--data.heldout x.jsonl --data.train x.jsonl", "data.heldout: "),
        ("--store.protocol rdma", "store.devices: is empty, but store.protocol: rdma needs them; name them as "),
        ("--target.path org/no-such-model", "target.path: org/no-such-model is not a directory, and not in the cache "),
    ],
)
def test_what_does_not_fit_together_is_refused_with_a_value_that_would_do(load, overrides, message):
    assert refused(load(*overrides.split())).startswith(message)


@pytest.mark.parametrize(
    "overrides", ["--inference.tensor_parallel 4", "--data.max_tokens 2048 --training.tokens_per_pack 2048"]
)
def test_what_just_fits_is_accepted(load, overrides):
    check(load(*overrides.split()))


def test_a_warm_up_that_never_ends_is_warned_of(load):
    (warning,) = check(load("--training.max_steps=20", "--training.warmup_steps=20"))
    assert warning.startswith("training.warmup_steps: 20: the run has only 20 steps, so it never reaches ")
    assert warning.endswith("; try 2")
