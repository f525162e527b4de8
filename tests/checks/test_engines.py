"""Arguments of SGLang that would break the capture, or that it does not have, and targets that GPUs can't share."""

from __future__ import annotations

import pytest

from specbatch.checks import check
from specbatch.inference.arguments import BREAKS_CAPTURE, SHARES_ROWS, sglang_argument_names
from tests.checks.messages import refused


def test_key_heads_fewer_than_ranks_are_copied_and_others_must_divide(load, changed):
    assert check(load("--inference.tensor_parallel=4", target=changed(num_key_value_heads=1))) == []
    message = refused(load("--inference.tensor_parallel=2", target=changed(num_key_value_heads=3)))
    assert message == "inference.tensor_parallel: 2 does not divide the target's 3 key heads; try 1"


def test_every_argument_that_would_break_the_capture_is_refused_by_name(load):
    config = load()
    for name, what_to_do in BREAKS_CAPTURE.items():
        config.inference.sglang = {name: 1}
        assert refused(config) == f"inference.sglang.{name}: can't be set here: {what_to_do}"
    assert "without a draft" in refused(load("--inference.sglang.speculative_num_steps=3"))


def test_only_the_parallelism_that_takes_rows_from_rank_0_is_refused(load):
    config = load()
    for name, why in SHARES_ROWS.items():
        config.inference.sglang = {name: 2}
        assert refused(config) == f"inference.sglang.{name}: can't be set here: {why}: remove it"
    config.inference.sglang = {"ep_size": 2, "dcp_size": 2, "attn_dp_size": 1, "moe_a2a_backend": "none"}
    assert check(config) == []
    assert "its own requests" in refused(load("--inference.sglang.enable_dp_attention=true"))


def test_arguments_that_leave_the_capture_alone_pass(load):
    overrides = ["--inference.sglang.mem_fraction_static=0.8", "--inference.sglang.disable_overlap_schedule=true"]
    assert check(load(*overrides, "--inference.sglang.chunked_prefill_size=128")) == []


def test_chunks_are_refused_where_the_capture_must_be_deterministic(load):
    message = refused(load("--inference.deterministic", "--inference.sglang.chunked_prefill_size=128"))
    assert message.startswith("inference.sglang.chunked_prefill_size: can't be set here: where a prompt is cut would")
    assert message.endswith("or set inference.deterministic: false")


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("mem_fraction_statc", "has no such argument; did you mean mem_fraction_static?"),
        ("max-running-requests", "has no such argument; did you mean max_running_requests?"),
        ("tensor_parallel_sizes", "if you mean tensor_parallel_size: set inference.tensor_parallel instead"),
        ("zzqqxx", "has no such argument; see `python -m sglang.launch_server --help`"),
    ],
)
def test_an_argument_that_sglang_does_not_have_is_refused_with_the_nearest(load, name, end):
    message = refused(load(f"--inference.sglang.{name}=1"))
    assert message.startswith(f"inference.sglang.{name}: SGLang ")
    assert message.endswith(end)


def test_the_arguments_of_the_installed_sglang_are_known():
    names = sglang_argument_names()
    assert {"mem_fraction_static", "attention_backend", "quantization", "max_total_tokens", "load_format"} <= names
    assert {name for name in BREAKS_CAPTURE if "parallel_size" not in name and name not in ("tp", "dp")} <= names
    assert set(SHARES_ROWS) <= names
