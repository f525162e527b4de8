"""What SGLang computed is compared with what was planned."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import numpy as np

from specbatch.inference.capture_request import new_capture_request
from specbatch.inference.prefill_capture import other_tokens

CAPTURE = new_capture_request(1, (0, 0), 7, "", np.array([5, 3, 3, 6]), {"aux": np.arange(4)})


def test_tokens_of_a_text_are_those_that_were_sent() -> None:
    def request(*ids: int) -> SimpleNamespace:
        return SimpleNamespace(multimodal_inputs=None, origin_input_ids=array("q", ids))

    assert other_tokens(request(5, 3, 3, 6), CAPTURE) is None
    assert other_tokens(request(5, 3, 6, 6), CAPTURE) == "SGLang ran other tokens than those sent"
    assert other_tokens(request(0), CAPTURE) == "SGLang ran other tokens than those sent"


def test_images_are_expanded_as_planned_whatever_stands_for_them_in_the_cache() -> None:
    def request(*ids: int) -> SimpleNamespace:
        cached = array("q", [1 << 60 if token == 3 else token for token in ids])
        return SimpleNamespace(
            multimodal_inputs=object(), origin_input_ids=cached, origin_input_ids_unpadded=array("q", ids)
        )

    assert other_tokens(request(5, 3, 3, 6), CAPTURE) is None
    said = other_tokens(request(5, 3, 3, 3, 6), CAPTURE) or ""
    assert "makes 5 tokens of sample 7 and its images" in said
    assert "not the 4 that were prepared" in said
