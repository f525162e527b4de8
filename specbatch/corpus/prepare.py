"""Prepare conversations once: read, convert with as many processes as wanted, write, remember under a key.

The key is a hash of everything that changes the result, the tokenizer's files and the template included. What is
prepared is renamed into place last, so prepared data are whole or not there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from specbatch.config import Config
from specbatch.corpus.sources import Row, Source, find_sources
from specbatch.corpus.summary import Part, Summary, part_from_json
from specbatch.corpus.tokenizer import tokenizer_fingerprint
from specbatch.errors import UserError
from specbatch.rundir import read_json, write_json

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many rows are done, and of how many."""

VERSION = 2
"""Of everything here that turns rows into samples: raised whenever the result changes."""

_RESULT_SETTINGS = ("format", "loss_on", "split_turns", "max_tokens", "overlong")


def prepare(config: Config, progress: Progress | None = None) -> Summary:
    """Prepare the training and the held-out data, unless they are prepared already.

    Args:
        progress: told now and then how far it is.

    Returns:
        What was prepared and where; its ``text()`` is for people.

    Raises:
        UserError: if too much of the data is unusable, nothing is left of it, or files or tokenizer cannot be read.
    """
    started = time.monotonic()
    tokenizer = tokenizer_fingerprint(config)
    train, size, cached = _prepare_part(config, tokenizer, "training", config.data.train, progress)
    heldout = None
    if config.data.heldout:
        heldout, _, found = _prepare_part(config, tokenizer, "held-out", config.data.heldout, progress)
        cached = cached and found
    summary = Summary(train, heldout, size, time.monotonic() - started, cached)
    log.info("corpus prepared samples=%d fingerprint=%s cached=%s", train.samples, train.fingerprint, cached)
    return summary


def cache_root(config: Config) -> Path:
    """The directory under which prepared data are kept."""
    if config.data.cache_dir:
        return Path(config.data.cache_dir).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "specbatch"


def _prepare_part(
    config: Config, tokenizer: str, title: str, names: list[str], progress: Progress | None
) -> tuple[Part, int, bool]:
    """One part of the data, the tokenizer's size, and whether it was prepared before."""
    sources = find_sources(names)
    scans = []
    for number, source in enumerate(sources):
        if progress:
            progress(f"reading {title} data", number, len(sources))
        scans.append(source.scan())
    settings = {
        "version": VERSION,
        "tokenizer": tokenizer,
        "part": title,
        "sources": [(source.name, rows, digest) for source, (rows, digest) in zip(sources, scans, strict=True)],
        **{name: getattr(config.data, name) for name in _RESULT_SETTINGS},
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    place = cache_root(config) / key
    found = read_json(place / "part.json")
    if found is None:
        total = sum(rows for rows, _ in scans)
        found = _write(config, settings, place, title, sources, total, progress)
        cached = False
    else:
        cached = True
    part = part_from_json({**found["part"], "path": str(place)})
    judge(config, title, part)
    return part, int(found["tokenizer_size"]), cached


def _write(
    config: Config, settings: dict[str, Any], place: Path, title: str, sources: list[Source], total: int,
    progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    """Convert all rows and put the result in place."""
    from specbatch.corpus.convert import convert_rows
    from specbatch.corpus.tokenizer import load_tokenizer, tokenizer_size
    from specbatch.corpus.write import PartWriter

    tokenizer = load_tokenizer(config)
    size = tokenizer_size(tokenizer)
    place.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
    try:
        with PartWriter(made, size) as writer:
            done = 0
            for batch in convert_rows(config, tokenizer, rows_of(sources), total, prompts=title == "held-out"):
                writer.add(batch)
                done += len(batch)
                if progress:
                    progress(f"preparing {title} data", done, total)
        found = {"part": dataclasses.asdict(writer.part), "tokenizer_size": size, "settings": settings}
        judge(config, title, writer.part)
        write_json(made / "part.json", found)
        try:
            made.rename(place)
        except OSError:
            if not (place / "part.json").is_file():
                raise
            log.info("prepared at the same time by another process path=%s", place)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return found


def rows_of(sources: list[Source]) -> Iterator[tuple[str, Row]]:
    """All rows, each with the file and the line that it comes from."""
    for source in sources:
        for number, row in source.rows():
            yield f"{source.name}:{number}", row


def judge(config: Config, title: str, part: Part) -> None:
    """Refuse data that are mostly unusable, and data of which nothing is left.

    Raises:
        UserError: they are.
    """
    listed = "".join(f"\n  {item.text()}" for item in part.skipped)
    if not part.samples and not part.prompts:
        raise UserError(
            f"the {title} data give no sample out of {part.rows:,} rows:{listed}\n{_likeliest(config, part)}"
        )
    counted = part.rows - sum(item.count for item in part.skipped if item.reason == "blank line")
    share = part.bad_rows / max(1, counted)
    if share > config.data.max_bad_fraction:
        raise UserError(
            f"{part.bad_rows:,} of {counted:,} rows of the {title} data are unusable ({100 * share:.1f} %), and "
            f"data.max_bad_fraction allows {100 * config.data.max_bad_fraction:.1f} %:{listed}\n"
            "mend them, or allow more"
        )


_ADVICE = {
    "without the key": "name the columns as OpenAI (messages), ShareGPT (conversations) or plain text (text) data do",
    "no assistant turn": "these are prompts without answers: let the target answer them with `specbatch regenerate`",
    "refused by the chat template": "the target's chat template does not take conversations of this shape",
    "unknown role": "rename the roles of the data",
    "mask not provable": "the target's chat template hides which tokens the assistant writes: try data.split_turns, "
    "or a template with {% generation %} markers",
    "no loss token within max_tokens": "raise data.max_tokens",
    "longer than max_tokens": "raise data.max_tokens, or set data.overlong: truncate",
    "no loss token": "answers are empty or too short to learn from",
}


def _likeliest(config: Config, part: Part) -> str:
    """What to do about a corpus of which nothing is left."""
    reasons = [item for item in part.skipped if item.reason != "blank line"]
    if not reasons:
        return f"the files are empty: {', '.join(config.data.train)}"
    for beginning, advice in _ADVICE.items():
        if reasons[0].reason.startswith(beginning):
            return f"likeliest cause: {advice}"
    return f"likeliest cause: the data are not what they are said to be ({reasons[0].reason})"
