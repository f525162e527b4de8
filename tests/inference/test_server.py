"""Passing arguments to SGLang."""

from __future__ import annotations

from pathlib import Path

import pytest

from specbatch.inference.command import bind_cores, command_line
from specbatch.inference.server import ServerDied, SGLangServer


def test_arguments_reach_sglang_byte_for_byte() -> None:
    words = command_line(
        {
            "chat_template": 'my dir/"t".jinja',
            "disable_radix_cache": True,
            "enable_mixed_chunk": False,
            "revision": None,
            "chunked_prefill_size": -1,
            "return_aux_hidden_state_layer_ids": [1, 14],
            "json_model_override_args": {"a": 1},
        }
    )
    assert words == [
        '--chat-template=my dir/"t".jinja',
        "--disable-radix-cache",
        "--chunked-prefill-size=-1",
        "--return-aux-hidden-state-layer-ids",
        "1",
        "14",
        '--json-model-override-args={"a": 1}',
    ]


def test_no_key_is_taken_for_an_option(tmp_path: Path) -> None:
    # One in 64 began with a dash once, and its engine did not start.
    assert all(SGLangServer({}, tmp_path / "log")._key.isalnum() for _ in range(1000))


def test_ranks_get_cores_of_their_own_where_there_are_enough() -> None:
    assert bind_cores([0, 1, 2, 3], 2, None) == "0,1|2,3"
    assert bind_cores([4, 5, 6, 7], 2, 1) == "4|5"
    assert bind_cores([0], 2, None) == "0|0"
    assert bind_cores([0, 1], 2, 8) == "0,1|0,1"


@pytest.mark.light
def test_the_end_of_the_log_is_in_the_error_when_an_engine_does_not_start(tmp_path: Path) -> None:
    server = SGLangServer({"model_path": str(tmp_path / "no such model")}, tmp_path / "logs" / "engine.log", threads=1)
    with pytest.raises(ServerDied, match="no such model"), server:
        pass
