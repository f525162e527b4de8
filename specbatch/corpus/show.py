"""``specbatch data``: prints conversations as tokens. Loss tokens are coloured, or in double brackets."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from specbatch.config import Config
from specbatch.corpus.prepare import Progress, prepare
from specbatch.corpus.prepared import Corpus, corpus_of
from specbatch.corpus.stats import stats
from specbatch.corpus.tokenizer import load_tokenizer

_LOSS = ("\x1b[30;42m", "\x1b[30;102m")
_OTHER = ("\x1b[2m", "\x1b[22m")
"""Two alternating shades each, so that the border between two tokens is visible."""
_RESET = "\x1b[0m"


def show(config: Config, samples: int, color: bool | None = None, statistics: bool = False) -> None:
    """Prepare the data and print the first samples of the training data and the summary.

    Args:
        samples: number of samples.
        color: use colours, or brackets around loss tokens. Default: colours if stdout is a terminal.
        statistics: print statistics of the training data, too.

    Raises:
        UserError: the same as `prepare`.
    """
    if color is None:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    with progress_bar() as progress:
        summary = prepare(config, progress)
    corpus = corpus_of(summary)
    if min(samples, len(corpus)) > 0:
        tokenizer = load_tokenizer(config)
        for i in range(min(samples, len(corpus))):
            print(_title(corpus, i))
            sample = corpus.sample(i)
            print(marked(tokenizer, sample.input_ids, sample.loss_mask, color), end="\n\n")
    if statistics:
        print(stats(config, corpus))
    print(summary.text())


def _title(corpus: Corpus, i: int) -> str:
    mask = corpus.sample(i).loss_mask
    return f"sample {i}, {corpus.place(i)}: {mask.size:,} tokens, {int(mask.sum()):,} loss tokens"


def marked(tokenizer: Any, input_ids: np.ndarray, loss_mask: np.ndarray, color: bool) -> str:
    """Return the text of tokens, with loss tokens marked.

    Args:
        input_ids: int ``[tokens]``.
        loss_mask: bool ``[tokens]``.
        color: show each token in a shade by its mask, instead of double brackets around runs of loss tokens.
    """
    parts: list[str] = []
    before = False
    for number, (text, loss) in enumerate(_pieces(tokenizer, input_ids.tolist(), loss_mask.tolist())):
        if color:
            shade = (_LOSS if loss else _OTHER)[number % 2]
            # A coloured line break would colour the rest of the line.
            parts += [shade, text.replace("\n", f"↵{_RESET}\n{shade}"), _RESET]
        else:
            parts += ["[[" if loss else "]]"] if loss != before else []
            parts.append(text)
            before = loss
    if before:
        parts.append("]]")
    return "".join(parts)


def _pieces(tokenizer: Any, ids: list[int], mask: list[bool]) -> Iterator[tuple[str, bool]]:
    """Yield the texts of single tokens, or of the few that form one character together."""
    held: list[int] = []
    for position, token in enumerate(ids):
        held.append(token)
        text = tokenizer.decode(held, clean_up_tokenization_spaces=False)
        last = position + 1 == len(ids) or mask[position + 1] != mask[position]
        if last or len(held) == 4 or not text.endswith("\ufffd"):
            yield "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text), mask[position]
            held = []


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """Show a progress bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)
