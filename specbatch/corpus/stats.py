"""``specbatch data --stats``: statistics of the prepared data that help to choose settings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from specbatch.config import Config
from specbatch.corpus.prepared import Corpus
from specbatch.plan import Plan

BAR = 40
"""Characters of the longest bar."""
VOCABULARIES = (8192, 16384, 32768, 65536)


def stats(config: Config, corpus: Corpus) -> str:
    """Return lines for people about prepared training data."""
    told = (_lengths(corpus), _sources(corpus), _refused(corpus), _vocabulary(corpus), _fill(config, corpus))
    return "\n".join(["tokens per sample:", *(line for lines in told for line in lines)])


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Count samples by length, in classes that double: lowest length, highest length, and count."""
    classes = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(classes)
    return [(1 << c, (2 << c) - 1, int(counts[c])) for c in range(classes.min(), len(counts))]


def coverage(loss_token_counts: np.ndarray, size: int) -> float:
    """Return the share of loss tokens that are among the ``size`` most frequent ids."""
    most = np.sort(loss_token_counts)[::-1]
    return float(most[:size].sum() / max(1, most.sum()))


def fill(lengths: np.ndarray, tokens_per_pack: int, seed: int) -> float:
    """Return the share of the first epoch's packs that is filled with tokens."""
    plan = Plan(lengths, seed=seed, epochs=1, tokens_per_pack=tokens_per_pack, packs_per_step=1)
    return float(lengths.sum() / (plan.steps * tokens_per_pack))


def _lengths(corpus: Corpus) -> Iterator[str]:
    found = histogram(corpus.lengths)
    most = max(count for _, _, count in found)
    for low, high, count in found:
        bar = "#" * -(-BAR * count // most)
        yield f"  {low:>9,} to {high:>9,}  {count:>11,}  {bar}"


def _sources(corpus: Corpus) -> Iterator[str]:
    part = corpus.part
    yield f"loss tokens: {part.loss_tokens:,} of {part.tokens:,} ({part.loss_tokens / max(1, part.tokens):.1%})"
    yield "by source:"
    whole = sum(source.tokens for source in part.sources)
    for source in part.sources:
        yield (
            f"  {source.name}: {source.samples:,} samples of {source.rows:,} rows, {source.tokens:,} tokens "
            f"({source.tokens / max(1, whole):.1%}), {source.loss_tokens / max(1, source.tokens):.1%} loss"
        )


def _refused(corpus: Corpus) -> Iterator[str]:
    if corpus.part.skipped:
        yield "refused rows, with an example each:"
        yield from (f"  {item.text()}" for item in corpus.part.skipped)


def _vocabulary(corpus: Corpus) -> Iterator[str]:
    counts = corpus.loss_token_counts
    yield f"loss tokens outside of a draft vocabulary ({np.count_nonzero(counts):,} distinct ones):"
    for size in VOCABULARIES:
        if size < corpus.tokenizer_size:
            yield f"  draft.vocab_size: {size:<6} {1 - coverage(counts, size):8.3%}"
    yield "  draft.vocab_size: null      none"


def _fill(config: Config, corpus: Corpus) -> Iterator[str]:
    lengths, size = corpus.lengths, max(config.training.tokens_per_pack, corpus.part.length_max)
    yield "share of packs that is filled:"
    for tokens in (size, 2 * size, 4 * size):
        share = fill(lengths, tokens, config.run.seed)
        yield f"  training.tokens_per_pack: {tokens:<7} {share:6.1%}"
