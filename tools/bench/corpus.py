#!/usr/bin/env python3
"""Measures the cost of preparing and planning corpora of real size, on generated corpora.

    tools/bench/corpus.py --target TARGET [--parts sizes beside speedup turns plan] [--beside 80000] [--workers 2]

Conversations of sentences of Python's manual, about 1,000 tokens each, are prepared with an empty cache. ``sizes``: at
each size. ``beside``: in turns with the same tokenizer on the same rendered text, which as many processes encode, each
text at its fastest. ``speedup``: by as many processes, and by one. ``turns``: conversations of 256 messages, and one
sample for each turn of 64 messages. ``plan``: `specbatch plan` answers for samples that lie prepared (--plan-samples,
--plan-tokens); their ids are a hole in a file. The last line is JSON, with what was measured of:

    exponent                 of the time, over the sizes: 1 is linear
    tokens_per_s             prepared, at the largest size
    peak_bytes               of all processes of the preparation together, shared pages counted once
    tokenizer_tokens_per_s   of the tokenizer alone
    over_tokenizer           the preparation's time for a token, in times of the tokenizer's: median of the rounds
    processor_over_tokenizer the same of processor time, start included: of use where the machine has other work
    speedup                  of as many workers over one
    long_share, split_share  tokens/s of 256 messages and of a sample for each turn, in shares of those of short ones
    plan_s, plan_bytes       wall time and peak memory of `specbatch plan`
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]  # so that it runs from a checkout
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
POLL_S = 1.0
"""Interval at which memory is read, which stops a process for tens of milliseconds."""
LONGEST = 2048
"""Tokens of the longest sample."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="a target's directory: tokenizer and config.json")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 80_000, 320_000], help="conversations")
    parser.add_argument("--beside", type=int, default=80_000, help="conversations of beside and speedup")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of beside and speedup")
    parser.add_argument("--long", type=int, default=8_000, help="conversations of 256 messages")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=6, help="messages of a conversation")
    parser.add_argument("--words", type=int, default=620, help="words of a conversation")
    parser.add_argument("--made-up", action="store_true", help="made-up words instead of English, but for turns")
    parser.add_argument("--plan-samples", type=int, default=5_000_000)
    parser.add_argument("--plan-tokens", type=float, default=6e9)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="specbatch-bench-") as folder:
        for part in options.parts:
            found |= PARTS[part](options, Path(folder))
    print(json.dumps(found))
    return 0


def over_sizes(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure preparation at each size."""
    times, found = [], {}
    for size in sorted(options.sizes):
        source = folder / f"{size}.jsonl"
        write(source, size, options.turns, options.words, options.made_up)
        made = prepared(options, folder, source)
        print(f"{size:,} conversations: {made}", flush=True)
        times.append((size, made.seconds))
        found = {"tokens_per_s": round(made.tokens / made.seconds), "peak_bytes": made.peak_bytes}
        source.unlink()
    return {"exponent": exponent(times), **found}


def beside_tokenizer(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Preparation, and the tokenizer alone before and after it."""
    source, walls, cpus, speeds = folder / "beside.jsonl", [], [], []
    write(source, options.beside, options.turns, options.words, options.made_up)
    for _ in range(options.rounds):
        before = tokenizer_alone(options, source)
        made = prepared(options, folder, source)
        after = tokenizer_alone(options, source)
        print(f"the tokenizer alone: {before}\npreparation: {made}\nthe tokenizer alone: {after}", flush=True)
        alone = Took(
            before.tokens + after.tokens, before.seconds + after.seconds, before.processor_s + after.processor_s
        )
        walls.append(made.seconds / made.tokens * alone.tokens / alone.seconds)
        cpus.append(made.processor_s / made.tokens * alone.tokens / alone.processor_s)
        speeds.append(alone.tokens / alone.seconds)
    source.unlink()
    return {
        "tokenizer_tokens_per_s": round(median(speeds)),
        "over_tokenizer": round(median(walls), 3),
        "processor_over_tokenizer": round(median(cpus), 3),
    }


def over_processes(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Preparation by all processes and by one, in turns."""
    source, found = folder / "speedup.jsonl", []
    write(source, options.beside, options.turns, options.words, options.made_up)
    for _ in range(options.rounds):
        many, one = prepared(options, folder, source), prepared(options, folder, source, workers=1)
        print(f"by {options.workers} processes: {many}\nby one process: {one}", flush=True)
        found.append(one.seconds / many.seconds)
    source.unlink()
    return {"speedup": round(median(found), 2)}


def over_turns(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Conversations of many messages, and one sample for each turn, beside short ones of as many tokens."""
    speeds = {}
    for name, count, turns, words, data in (
        ("short", options.long * 7, options.turns, options.words, {}),
        ("long", options.long, 256, options.words * 7, {}),
        ("split", options.long // 4, 64, options.words * 2, {"split_turns": True}),
    ):
        source = folder / f"{name}.jsonl"
        write(source, count, turns, words)
        made = prepared(options, folder, source, max_tokens=8192, **data)
        print(f"{name}: {made}", flush=True)
        speeds[name] = made.tokens / made.seconds
        source.unlink()
    return {f"{name}_share": round(speeds[name] / speeds["short"], 3) for name in ("long", "split")}


def over_plan(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The plan of samples that lie prepared."""
    seconds, peak_bytes = planned(options, folder)
    print(f"plan of {options.plan_samples:,} samples: {seconds:.1f} s, {peak_bytes:,} B", flush=True)
    return {"plan_s": round(seconds, 2), "plan_bytes": peak_bytes}


PARTS = {
    "sizes": over_sizes,
    "beside": beside_tokenizer,
    "speedup": over_processes,
    "turns": over_turns,
    "plan": over_plan,
}


@dataclass(frozen=True)
class Took:
    """What some work took."""

    tokens: int
    seconds: float
    processor_s: float
    """Processor time of all its processes."""
    peak_bytes: int = 0

    def __str__(self) -> str:
        rate, peak = self.tokens / self.seconds, f", {self.peak_bytes:,} B" if self.peak_bytes else ""
        return f"{self.tokens:,} tokens, {self.seconds:.1f} s, {self.processor_s:.1f} processor s, {rate:,.0f}/s{peak}"


def exponent(times: list[tuple[int, float]]) -> float:
    """Return the slope of log time over log size, by least squares; 1 if there is only one size."""
    if len(times) < 2:
        return 1.0
    x, y = ([math.log(pair[i]) for pair in times] for i in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return round(slope, 3)


def write(path: Path, conversations: int, turns: int, words: int, made_up: bool = False) -> None:
    """Write a file of conversations, whose messages are cut out of sentences of Python's manual in random order, or of
    3,000 made-up words, which a tokenizer keeps in its cache: the hardest comparison with the tokenizer alone."""
    draw = random.Random(0)
    sentences = [part.split() for part in re.split(r"(?<=[.:;])\s+", "\n".join(topics.values()))]
    language = ["".join(draw.choices("etaoinshrdlucmfwyp", k=2 + i // 400)) for i in range(3000)]
    weights = [1 / (i + 3) for i in range(len(language))]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(conversations):
            text = draw.choices(language, weights, k=words) if made_up else []
            while len(text) < words:
                text += draw.choice(sentences)
            each = max(1, words // turns)
            messages = [
                {"role": ("user", "assistant")[i % 2], "content": " ".join(text[i * each : (i + 1) * each])}
                for i in range(turns)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def configuration(
    options: argparse.Namespace, folder: Path, source: Path, data: dict[str, Any], **training: int
) -> Path:
    """Write a configuration file for a source."""
    path = folder / f"{source.stem}.yaml"
    config = {
        "run": {"dir": str(folder / "run")},
        "target": {"path": str(options.target.absolute())},
        "data": {
            "train": [str(source)],
            "workers": options.workers,
            "max_tokens": LONGEST,
            "cache_dir": str(folder / "cache"),
            **data,
        },
        "draft": {"vocab_size": None},
        "training": {"tokens_per_pack": 8192, "warmup_steps": 0, **training},
        "store": {"bytes_per_rank": "1TiB"},
        "evaluate": {"prompts": 0},
    }
    path.write_text(json.dumps(config))
    return path


def prepared(options: argparse.Namespace, folder: Path, source: Path, **data: Any) -> Took:
    """Prepare a file with an empty cache, in a separate process.

    Args:
        data: settings of the configuration's section.
    """
    shutil.rmtree(folder / "cache", ignore_errors=True)
    code = (
        "import sys, time; from pathlib import Path; from specbatch.config import load_config;"
        "from specbatch.corpus import prepare;"
        "start = time.monotonic(); summary = prepare(load_config(Path(sys.argv[1])));"
        "print(summary.train.tokens, time.monotonic() - start)"
    )
    command = [sys.executable, "-c", code, str(configuration(options, folder, source, data))]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process,
        watched(process.pid) as seen,
    ):
        said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    tokens, seconds = said.split()
    return Took(int(tokens), float(seconds), sum(seen.processor_s.values()), seen.peak_bytes)


@dataclass
class Seen:
    """What was seen of a process and its descendants."""

    peak_bytes: int = 0
    """The most memory of all together."""
    processor_s: dict[int, float] = field(default_factory=dict)
    """Processor time of each process, as it was seen last."""


@contextmanager
def watched(pid: int) -> Iterator[Seen]:
    """Measure a process and its descendants, at intervals."""
    import psutil

    seen, over = Seen(), threading.Event()

    def watch() -> None:
        while not over.wait(POLL_S):
            total = 0
            with suppress(psutil.NoSuchProcess):
                top = psutil.Process(pid)
                for process in (top, *top.children(recursive=True)):
                    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                        total += process.memory_full_info().pss
                        seen.processor_s[process.pid] = sum(process.cpu_times()[:2])
            seen.peak_bytes = max(seen.peak_bytes, total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def tokenizer_alone(options: argparse.Namespace, source: Path, most: int = 20_000) -> Took:
    """Measure the tokenizer alone on the rendered text of a file: as many processes, no offsets, many texts at once."""
    code = (
        "import sys, json, time; from itertools import islice; from transformers import AutoTokenizer;"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "at, step, most = map(int, sys.argv[3:]);"
        "rows = [json.loads(line) for line in islice(open(sys.argv[2]), at, most, step)];"
        "texts = [t.apply_chat_template(row['messages'], tokenize=False) for row in rows];"
        "print('ready', flush=True); sys.stdin.readline(); start, begun = time.monotonic(), time.process_time();"
        "encode = t.backend_tokenizer.encode_batch_fast;"
        "tokens = sum(len(done.ids) for i in range(0, len(texts), 64)"
        " for done in encode(texts[i : i + 64], add_special_tokens=False));"
        "print(tokens, start, time.monotonic(), time.process_time() - begun)"
    )
    environment = {**ENVIRONMENT, "TOKENIZERS_PARALLELISM": "false"}
    count = options.workers
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(options.target), str(source), str(i), str(count), str(most)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for i in range(count)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [[float(word) for word in process.communicate()[0].split()] for process in processes]
    tokens, starts, ends, processor_s = zip(*said, strict=True)
    return Took(int(sum(tokens)), max(ends) - min(starts), sum(processor_s))


def planned(options: argparse.Namespace, folder: Path) -> tuple[float, int]:
    """Return wall time and peak memory of `specbatch plan` for samples whose ids are a hole in a file."""
    source = folder / "planned.jsonl"
    write(source, 8, options.turns, options.words)
    prepared(options, folder, source)
    config = configuration(options, folder, source, {}, packs_per_step=64)
    pretend(folder / "cache", str(source), options.plan_samples, options.plan_tokens)
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "specbatch", "plan", "--config", str(config), "--json"],
        stdout=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("specbatch plan failed; its message is above")
    return time.monotonic() - start, usage.ru_maxrss * 1024


def pretend(cache: Path, source: str, samples: int, tokens: float) -> None:
    """Replace the prepared samples of a file by many others, of lognormal length, half of them loss tokens."""
    import numpy as np

    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.lognormal(0, 0.4, samples), 2)
    lengths = np.clip((lengths * tokens / lengths.sum()).astype(np.int64), 8, LONGEST)
    parts = {path.parent: json.loads(path.read_text()) for path in cache.glob("*/part.json")}
    (whole,) = [found for found in parts.values() if [one["name"] for one in found["part"]["sources"]] == [source]]
    folder = Path(whole["part"]["sources"][0]["path"])
    ends = np.cumsum(lengths)
    with (folder / "ids.bin").open("wb") as file:
        file.truncate(4 * int(ends[-1]))
    spans = np.stack([lengths // 4, lengths // 2, lengths * 3 // 4, lengths], axis=1).astype(np.int32)
    for name, values in (
        ("ends", ends), ("spans", spans), ("span_ends", 2 * np.arange(1, samples + 1)),
        ("rows", np.arange(samples)), ("hashes", np.arange(samples, dtype=np.uint64)),
    ):  # fmt: skip
        values.tofile(folder / f"{name}.bin")
    counted = {"samples": samples, "tokens": int(ends[-1])}
    whole["part"].update(counted)
    whole["part"]["sources"][0].update(counted)
    for path, found in parts.items():
        if found is whole:
            (path / "part.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
