"""Positions among tokens are the same whichever way they are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from specbatch.corpus.conversation import Rejected
from specbatch.corpus.encoder import Encoder
from specbatch.corpus.samples import Converter
from specbatch.drafts.eagle3.contract import has_targets, target_positions

STOP = "<|im_end|>"
PIECES = [
    "a",
    "the ",
    " ",
    "\n",
    "é",
    "a\u0301",
    "日本",
    "\U0001f600",
    "\u2581",
    "\u00a0",
    STOP,
    "<|im_start|>",
    "<0x41>",
]


@pytest.fixture(scope="module")
def pieces() -> Any:
    """A tokenizer as sentencepiece's are: spaces are signs, what it does not know is bytes, nothing stands before."""
    signs = ["\u2581", "a", "t", "h", "e", "\u2581a", "th", "the", "\n", "the\u2581"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *signs]
    merges = [("\u2581", "a"), ("t", "h"), ("th", "e"), ("the", "\u2581")]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (STOP, "<|im_start|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=STOP)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=12), min_size=1, max_size=6), data=st.data()
)
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_positions_by_bytes_are_those_by_offsets(
    tokenizer: Any, pieces: Any, kind: str, texts: list[list[str]], data: st.DataObject
) -> None:
    encoder = Encoder(tokenizer if kind == "bytes" else pieces, [STOP, "<|im_start|>"])
    asked = []
    for words in texts:
        text = "".join(words)
        edges = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
        asked.append((text, list(zip(edges[::2], edges[1::2], strict=False))))
    for (text, spans), found in zip(asked, encoder.encode_all(asked), strict=True):
        expected = encoder._aligned(text, spans)
        assert isinstance(found, Rejected) == isinstance(expected, Rejected)
        if isinstance(found, Rejected) or isinstance(expected, Rejected):
            assert str(found) == str(expected)
            continue
        assert found[0].tolist() == expected[0].tolist()
        assert found[1].tolist() == expected[1].tolist()


def test_text_that_tokens_do_not_make_up_is_found_by_offsets(pieces: Any) -> None:
    """A tokenizer that lowers its text: not one byte of the table can be believed."""
    backend = Tokenizer.from_str(pieces.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "\u2581")])
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=STOP), [STOP])
    for _ in range(20):  # and it is soon not tried any more
        ids, mask = encoder.encode(f"THE a{STOP}", [(3, 5)])
        assert [backend.id_to_token(token) for token in ids[mask].tolist()] == ["\u2581a"] or not mask.any()
    assert "_with_offsets" in vars(encoder)


def test_rows_that_are_converted_together_are_converted_as_alone(converter: Callable[..., Converter]) -> None:
    def talk(*texts: str, **last: Any) -> dict[str, Any]:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        messages[-1] |= last
        return {"messages": messages}

    rows: list[Any] = [
        talk("Hi", "Hello.", "And?", "Bye."),
        b"no JSON",
        talk("Hi", "x", weight=0),
        {"text": "Some text."},
        talk("Alone?"),
        talk("é", "\U0001f600 " * 40),
    ]
    places = [(f"a:{n}", row) for n, row in enumerate(rows, 1)]
    for data in ({}, {"split_turns": True}, {"loss_on": "all"}, {"max_tokens": 32}):
        for prompts in (False, True):
            make = converter(prompts=prompts, **data)
            for (place, row), together in zip(places, make.convert_all(places), strict=True):
                alone = make.convert(place, row)
                assert (alone.place, alone.rejected, alone.warnings) == (place, together.rejected, together.warnings)
                assert np.array_equal(alone.prompt, together.prompt) or alone.prompt is together.prompt is None
                assert len(alone.samples) == len(together.samples)
                for one, other in zip(alone.samples, together.samples, strict=True):
                    assert all(map(np.array_equal, one, other))


@given(mask=st.lists(st.booleans(), max_size=12))
def test_a_mask_has_targets_where_there_are_positions_of_them(mask: list[bool]) -> None:
    loss = np.array(mask, dtype=bool)
    assert has_targets(loss) == bool(target_positions(loss).size)
