"""A tokenizer and what turns rows into samples, for any chat template."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from specbatch.config import Config, Data, Run, Target
from specbatch.corpus.samples import Converter
from specbatch.corpus.tokenizer import load_tokenizer
from specbatch.drafts.eagle3.algorithm import Eagle3
from tests.corpus.templates import HEADERS
from tests.tiny_target import tokenizer as tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny_target: Path) -> Any:
    """The tiny target's, with its ChatML template; read only."""
    return load_tokenizer(Config(Run(dir="unused"), Target(str(tiny_target)), Data(train=[])))


@pytest.fixture
def converter(tokenizer: Any) -> Callable[..., Converter]:
    """Makes a converter for a chat template, the tokenizer's own if not given, and settings of ``data``."""

    def make(
        template: str | None = None, *, prompts: bool = False, end_ids: tuple[int, ...] = (), **data: Any
    ) -> Converter:
        mine = tokenizer
        if template is not None:
            mine = copy.deepcopy(tokenizer)
            mine.chat_template = template
        return Converter(mine, end_ids, Data(train=[], **data), prompts, Eagle3.teaches)

    return make


@pytest.fixture
def settings(tiny_target: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes a configuration for files with the given bytes, a cache of its own and settings of ``data``."""

    def make(
        files: dict[str, bytes], *, target: Path = tiny_target, heldout: tuple[str, ...] = (), **data: Any
    ) -> Config:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        train = [str(tmp_path / name) for name in files if name not in heldout]
        return Config(
            Run(dir=str(tmp_path / "run")),
            Target(str(target)),
            Data(
                train=train,
                heldout=[str(tmp_path / name) for name in heldout],
                **{"cache_dir": str(tmp_path / "cache"), **data},
            ),
        )

    return make


@pytest.fixture
def target_copy(tiny_target: Path, tmp_path: Path) -> Path:
    """A directory with the tiny target's tokenizer that may be changed; without weights."""
    return Path(shutil.copytree(tiny_target, tmp_path / "a target", ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture(scope="session")
def tokenizers() -> dict[bool, PreTrainedTokenizerFast]:
    """With headers that are special tokens, and with headers that are not."""
    made = {}
    for special in (True, False):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(
            [AddedToken(text, special=special or text == "<|stop|>", normalized=False) for text in HEADERS]
        )
        made[special] = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|stop|>")
    return made


@pytest.fixture(params=[True, False], ids=["special", "added"])
def kind(request: pytest.FixtureRequest, tokenizers: dict[bool, PreTrainedTokenizerFast]) -> Callable[..., Converter]:
    """Makes a converter for a template, for tokenizers of both sorts."""
    tokenizer = tokenizers[request.param]

    def make(template: str, ends: Sequence[str] = (), **data: Any) -> Converter:
        own = copy.copy(tokenizer)
        own.chat_template = template
        return Converter(
            own, tuple(own.convert_tokens_to_ids(list(ends))), Data(train=[], **data), False, Eagle3.teaches
        )

    return make
