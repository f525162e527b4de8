"""The section ``data.regenerate``, which lets the target answer the prompts of the data itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from specbatch.config.rules import ONE_LINE, above, at_least, at_most
from specbatch.config.types import Count, Natural, Share


@dataclass
class Regenerate:
    """The target answers the prompts of `data.train` itself, and the draft is trained on these answers."""

    answers: Natural = 0
    """Answers to each prompt. 0: train on the data unchanged; `specbatch regenerate` treats 0 as 1."""
    thinking: Share | None = None
    """Share of the answers before which the target thinks: 1 for all, 0 for none. If not given, the chat template's
    default. Each row of the output says which it was (`chat_template_kwargs`), and `data` respects that."""
    max_new_tokens: Count = 1024
    """Longest answer."""
    unfinished: Literal["skip", "keep"] = "skip"
    """What to do with a conversation in which an answer does not end within `max_new_tokens`: skip it, or keep it up to
    that answer, whose message gets `"finish_reason": "length"`, so that no end of turn is learnt there."""
    max_tokens: Count | None = None
    """Tokens of the longest conversation. If not given, the target's longest context."""
    temperature: Annotated[float, at_least(0)] | None = None
    """Sampling temperature; 0: always the likeliest token. If not given, that of the target's generation_config.json,
    as in serving."""
    top_p: Annotated[float, above(0), at_most(1)] | None = None
    """Sample from the likeliest tokens with this total probability. If not given, as for `temperature`."""
    top_k: Count | None = None
    """Sample from this number of likeliest tokens. If not given, as for `temperature`."""
    batch_size: Count = 32
    """Conversations that an engine works on at once."""
    rows_per_shard: Count = 5000
    """Rows of the input per file of the output."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """Format of the files in `answers` of the run directory."""
    endpoint: Annotated[str, ONE_LINE] = ""
    """URL of an OpenAI-compatible server that answers instead of engines, up to `/v1`; its key comes from the
    environment (`OPENAI_API_KEY`)."""
    model: Annotated[str, ONE_LINE] = ""
    """Name of the target on that server. If not given, its only model."""
