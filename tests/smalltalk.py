"""Conversations that mean nothing, for runs whose target knows nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = "sun rain warm cold and or we like to walk by sea in May take a coat".split()


def write_smalltalk(folder: Path, count: int, shortest: int, longest: int) -> None:
    """Write ``talks.jsonl`` with so many conversations, and ``others.jsonl`` with six: the same for the same arguments.

    Args:
        shortest: fewest words of a message.
        longest: most.
    """
    draw = random.Random(1)
    for name, rows in (("talks", count), ("others", 6)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(rows):
                ask, answer = (" ".join(draw.choices(WORDS, k=draw.randint(shortest, longest))) for _ in range(2))
                messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": messages}) + "\n")
