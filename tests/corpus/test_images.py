"""Conversations with images: their sources are read, and placeholders among tokens expanded as SGLang does."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from specbatch.checks import check, check_plan
from specbatch.config import Config, load_config
from specbatch.corpus import corpus_of, make_plan, prepare
from specbatch.corpus.conversation import IMAGE, Conversation, Rejected, read_row
from specbatch.corpus.images import ImageError, as_sent
from specbatch.drafts.base import algorithm_of
from specbatch.errors import UserError
from specbatch.target import read_target
from tools.targets.checkpoints import OF_IMAGES, SPECIAL, make_checkpoint

FIRST_ID = len(SPECIAL)
IMG, BREAK, END = range(FIRST_ID, FIRST_ID + len(OF_IMAGES))


@pytest.fixture(scope="module")
def sees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target of the class that is trained on images."""
    return make_checkpoint("Mistral-3-Images", tmp_path_factory.mktemp("sees") / "target")


def png(width: int, height: int, shade: int = 0) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (shade, 100, 200)).save(file, "PNG")
    return file.getvalue()


def url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def asked(*parts: str | dict[str, Any], answer: str = "It is a licence for software.") -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def image(source: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": source}}


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image", "image": "a/b.png"}, "/data/a/b.png"),
        ({"type": "image", "path": "/c.png"}, "/c.png"),
        ({"type": "image", "url": "file:///d%20e.png"}, "/d e.png"),
        ({"type": "image_url", "image_url": "f.png"}, "/data/f.png"),
        (image("data:image/png;base64,AAAA"), "data:image/png;base64,AAAA"),
    ],
)
def test_an_image_is_a_path_relative_to_the_file_or_a_data_url(part: dict[str, Any], source: str) -> None:
    found = read_row(asked("before ", part, " after"), "auto", Path("/data"))
    assert isinstance(found, Conversation)
    assert found.images == [source]
    assert found.messages[0]["content"] == f"before {IMAGE} after"


@pytest.mark.parametrize(
    ("row", "folder", "says"),
    [
        (asked(image("a.png")), None, "content that is not text.*data.images: true"),
        (asked(image("https://example.org/a.png")), "/data", "neither a file nor a data URL.*https://example.org"),
        (asked({"type": "image"}), "/data", "malformed.*names neither a file nor a data URL"),
        (asked(f"{IMAGE} ", image("a.png")), "/data", r"malformed.*U\+FFFC"),
        ({"messages": [{"role": "system", "content": [image("a.png")]}]}, "/data", "not a user's.*system"),
    ],
)
def test_other_images_are_refused_with_the_reason(row: dict[str, Any], folder: str | None, says: str) -> None:
    with pytest.raises(Rejected, match=says):
        read_row(row, "auto", Path(folder) if folder else None)


@pytest.fixture
def prepared(sees: Path, settings: Callable[..., Config]) -> Callable[..., Any]:
    """Prepares rows with images."""

    def make(rows: list[dict[str, Any]], **data: Any) -> Any:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        config = settings({"rows.jsonl": lines}, target=sees, images=True, max_tokens=200, max_bad_fraction=1.0, **data)
        return prepare(config)

    return make


def test_placeholders_become_the_tokens_of_the_processor_and_are_never_loss(
    prepared: Callable[..., Any], sees: Path, tmp_path: Path
) -> None:
    (tmp_path / "wide.png").write_bytes(png(112, 56))
    rows = [
        asked(image("wide.png"), "What is this?", image(url(png(20, 20)))),
        asked("What is a licence?"),
        asked("Compare ", image(url(png(56, 56))), image("wide.png")),
    ]
    corpus = corpus_of(prepared(rows, loss_on="all"))
    assert len(corpus) == 3
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(sees)
    wide = PIL.Image.open(tmp_path / "wide.png")
    text = (
        "<|im_start|>user\n[IMG]What is this?[IMG]<|im_end|>\n"
        "<|im_start|>assistant\nIt is a licence for software.<|im_end|>\n"
    )
    truth = processor(text=[text], images=[wide, PIL.Image.new("RGB", (20, 20))])["input_ids"][0]
    first = corpus.sample(0)
    np.testing.assert_array_equal(first.input_ids, truth)
    np.testing.assert_array_equal(first.loss_mask, ~np.isin(truth, (IMG, BREAK, END)))
    # 112 x 56 pixels in patches of 14, four of them together: two rows of four, each with a token at its end.
    assert [(found.source[:5], found.tokens) for found in first.images] == [(str(tmp_path)[:5], 10), ("data:", 2)]
    sent = as_sent(first.input_ids, first.images)
    assert sent.tolist() == processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert corpus.sample(1).images == ()
    adjacent = corpus.sample(2).images
    assert adjacent[0].first + adjacent[0].tokens == adjacent[1].first
    assert adjacent[0].tokens == 6


def test_rows_with_unusable_images_are_refused_with_file_and_line(prepared: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    rows = [
        asked("fine"),
        asked(image("missing.png"), "What is this?"),
        asked(image("text.png"), "What is this?"),
        asked(image(url(png(112, 112))), "[IMG] What is this?"),
        asked(image(url(png(112, 112))), *[image(url(png(112, 112)))] * 9, "Too many to fit."),
    ]
    summary = prepared(rows)
    assert summary.train.samples == 1
    found = {skipped.reason: skipped for skipped in summary.train.skipped}
    unreadable = found["an image that cannot be read"]
    assert unreadable.count == 2
    assert unreadable.first.endswith("rows.jsonl:2")
    assert "missing.png: No such file or directory" in unreadable.detail
    assert found["other images than the chat template shows"].first.endswith("rows.jsonl:4")
    # Never cut, although that is what data.overlong says.
    assert found["longer than max_tokens"].first.endswith("rows.jsonl:5")


def test_a_split_turn_has_the_images_before_it_and_equal_tokens_are_not_equal_images(
    prepared: Callable[..., Any],
) -> None:
    def talk(shade: int) -> dict[str, Any]:
        one, two = (asked(image(url(png(28, 28, shade + n))), "And this?", answer="A red square.") for n in range(2))
        return {"messages": one["messages"] + two["messages"]}

    corpus = corpus_of(prepared([talk(0), talk(10), talk(0)], split_turns=True, duplicates="drop"))
    assert [len(corpus.sample(i).images) for i in range(len(corpus))] == [1, 2, 1, 2]


def test_an_image_that_has_changed_is_noticed(prepared: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(28, 28))
    (found,) = corpus_of(prepared([asked(image("a.png"), "What?")])).sample(0).images
    assert found.url().endswith(base64.b64encode(png(28, 28)).decode())
    path.write_bytes(png(28, 28, 9))
    with pytest.raises(ImageError, match=r"a.png: the image has changed.*data.cache_dir"):
        found.url()
    path.unlink()
    with pytest.raises(ImageError, match=r"a\.png: No such file"):
        found.url()


def test_prompts_with_images_are_not_kept_for_evaluations(sees: Path, settings: Callable[..., Config]) -> None:
    rows = [asked(image(url(png(28, 28))), "What?"), asked("What is a licence?")]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    config = settings({"a.jsonl": lines, "b.jsonl": lines}, target=sees, heldout=("b.jsonl",), images=True)
    heldout = corpus_of(prepare(config)).heldout
    assert heldout is not None
    assert (len(heldout), len(heldout.prompts())) == (2, 1)
    config = settings(
        {"a.jsonl": lines, "c.jsonl": lines.splitlines()[0]}, target=sees, heldout=("c.jsonl",), images=True
    )
    corpus = corpus_of(prepare(config))
    with pytest.raises(UserError, match=r"data\.heldout: every prompt has images"):
        check_plan(config, make_plan(config, corpus), corpus, algorithm_of(config, read_target(str(sees))))


def test_images_of_other_targets_algorithms_and_purposes_are_refused_by_name(
    sees: Path, tiny_target: Path, tmp_path: Path
) -> None:
    def refused(target: Path, *overrides: str) -> str:
        path = tmp_path / "a.yaml"
        path.write_text(
            f"run: {{dir: '{tmp_path}/run'}}\ntarget: {{path: '{target}'}}\n"
            "data: {train: [a.jsonl], max_tokens: 256}\n"
        )
        with pytest.raises(UserError) as caught:
            check(load_config(path, ["--data.images=true", *overrides]))
        return str(caught.value)

    assert "is a LlamaForCausalLM, and conversations with images can be trained only for Mistral3" in refused(
        tiny_target
    )
    assert "draft.algorithm: dflash are not trained on images" in refused(sees, "--draft.algorithm=dflash")
    assert "draft.train_embedding: true" in refused(sees, "--draft.train_embedding=true")
    assert "answer prompts without images only" in refused(sees, "--data.regenerate.answers=1")


def test_a_preparation_alone_also_refuses_targets_without_images(
    settings: Callable[..., Config], tiny_target: Path
) -> None:
    config = settings({"a.jsonl": json.dumps(asked("fine")).encode()})
    with pytest.raises(UserError, match=r"data.images: true: the target .* is a LlamaForCausalLM"):
        prepare(replace(config, data=replace(config.data, images=True)))
