"""What `specbatch regenerate` can be told, and what it tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from specbatch.config.rules import NOT_EMPTY, above, at_least, at_most
from specbatch.config.sections import Count, Natural, Place, Seconds

Progress = Callable[[int, int, float], None]
"""Told the rows done, the rows in all, and the tokens generated per second."""


@dataclass
class Regenerate:
    """Conversations in, the same conversations with the target's own answers out."""

    target: Place
    """A Hugging Face directory, or a hub name that is already in this machine's cache."""
    input: Annotated[list[Place], NOT_EMPTY]
    """Files (JSONL, JSON, Parquet, also compressed), directories of such, or names that `datasets` loads; rows with
    `messages`, `conversations` or a `prompt`."""
    output: Place
    """JSONL file to write; what it holds already is kept, and the work goes on behind it."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the engine computes in; auto: as the checkpoint says."""
    trust_remote_code: bool = False
    """Let the target's directory bring its own Python code."""
    max_new_tokens: Count = 1024
    """Longest answer."""
    unfinished: Literal["skip", "keep"] = "skip"
    """A conversation in which an answer has no end within `max_new_tokens`. keep: it ends with that answer, whose
    message says `"finish_reason": "length"`, so that training takes no end of turn for what the target said."""
    max_tokens: Count | None = None
    """Longest conversation; the target's positions if not given."""
    temperature: Annotated[float, at_least(0)] = 0.0
    """0: always the likeliest token."""
    top_p: Annotated[float, above(0), at_most(1)] = 1.0
    """Sample from the likeliest tokens that have this much probability together."""
    seed: Natural = 0
    """Of the sampling, where the temperature is not 0: each answer has a seed of its own. SGLang heeds it only with
    `sglang.enable_deterministic_inference`, which it has for GPUs."""
    engines: Count = 1
    """SGLang instances on this machine."""
    tensor_parallel: Count = 1
    """GPUs that one engine is spread over."""
    threads: Count | None = None
    """CPU threads of an engine on a machine without GPU; torch's own choice if not given."""
    batch_size: Count = 32
    """Conversations that an engine works on at once."""
    start_timeout_s: Seconds = 900.0
    """Seconds that an engine may take to load the target."""
    sglang: dict[str, Any] = field(default_factory=dict)
    """Further arguments of SGLang, by SGLang's names."""


@dataclass
class Summary:
    """What was done."""

    rows: int
    """Rows of the input that are dealt with, by this call and earlier ones."""
    written: int
    """Conversations in the output."""
    skipped: dict[str, int]
    """Rows left out, by reason."""
    generated_tokens: int
    """Tokens that the target generated in this call, those of skipped rows included."""
    seconds: float
    """Seconds that this call generated for; the engines' start is not in it."""
