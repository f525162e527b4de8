"""The tiny target is a model like any other."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tiny_target import VOCAB, make_tiny_target


def test_the_tiny_target_loads_and_answers_with_sane_numbers(tiny_target: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.decode(ids).endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.bfloat16)
    with torch.no_grad():
        logits_1TV = model(torch.tensor([ids])).logits
    assert logits_1TV.shape == (1, len(ids), VOCAB)
    assert 0.1 < logits_1TV.float().std() < 10


def test_the_tiny_target_is_the_same_each_time(tiny_target: Path, tmp_path: Path):
    again = make_tiny_target(tmp_path / "again")
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in tiny_target.iterdir()
    }


def test_text_survives_the_tiny_tokenizer(tiny_target: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    text = "Grüße, 東京 🙂\n\ttwo  spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
