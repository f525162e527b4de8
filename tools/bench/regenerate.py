#!/usr/bin/env python
"""Measures the share of an engine's speed that ``specbatch regenerate`` reaches, and whether kills lose or repeat
answers.

    tools/bench/regenerate.py --target DIR [--prompts 64] [--batch_size 8] [--max_new_tokens 32] [--kill]

The same prompts are given to the same engine twice: by as many threads as it answers at once, and by a run. With
``--kill`` another run's engine and then its head are killed (SIGKILL) in the middle. The last line is JSON:
``{"engine_answers_per_s", "run_answers_per_s", "share", "rows", "each_once", "same_rows"}``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from specbatch.config import load_config
from specbatch.corpus.conversation import Conversation
from specbatch.corpus.template import Template
from specbatch.corpus.tokenizer import end_ids, load_tokenizer
from specbatch.inference.arguments import start_timeout_s
from specbatch.regenerate.speaker import Question, Speaker
from specbatch.regenerate.voices import OwnEngine
from specbatch.rundir import read_json
from specbatch.target import read_target

SUBJECTS = "tides rivers bridges bread clocks maps wool glass salt maple honey chess kites lamps ferns".split()
WAIT_S = 900.0


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kill", action="store_true", help="kill an engine and the head of another run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="specbatch-bench-") as folder:
        bench = Bench(Path(folder), options)
        bench.run("calm")
        found = bench.figures()
        if options.kill:
            bench.run("killed", kill=True)
            found |= bench.compared()
    print(json.dumps(found))


class Bench:
    """Runs of the same prompts, in one folder."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder, self._options = folder, options
        rows = [
            {"id": number, "prompt": f"Tell me {number} things about {SUBJECTS[number % len(SUBJECTS)]}."}
            for number in range(options.prompts)
        ]
        self._rows = folder / "prompts.jsonl"
        self._rows.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, name: str, kill: bool = False) -> None:
        """Answer all prompts by ``specbatch regenerate``."""
        root, options = self._folder / name, self._options
        words = ["--target", options.target, "--input", str(self._rows), "--output", str(root)]
        words += ["--batch_size", str(options.batch_size), "--max_new_tokens", str(options.max_new_tokens)]
        words += ["--unfinished", "keep", "--temperature", "0", "--rows_per_shard", "16"]
        words += ["--threads", str(options.threads)] if options.threads else []
        with subprocess.Popen([sys.executable, "-m", "specbatch", "regenerate", *words], stdout=sys.stderr) as process:
            if kill:
                self._kill(root, process)
            if process.wait(WAIT_S):
                raise SystemExit(f"{root}: the run failed")

    def figures(self) -> dict[str, Any]:
        """Return the answers per second of the run, and of the engine alone."""
        answers = read_json(self._folder / "calm" / "status.json")["answers"]
        own = self._engine_answers_per_s()
        return {
            "engine_answers_per_s": round(own, 3),
            "run_answers_per_s": answers["per_s"],
            "share": round(answers["per_s"] / own, 3),
        }

    def compared(self) -> dict[str, Any]:
        """Return whether both runs answered each prompt exactly once."""
        calm, killed = (self._ids(name) for name in ("calm", "killed"))
        once = all(len(set(ids)) == len(ids) == self._options.prompts for ids in (calm, killed))
        return {"rows": len(killed), "each_once": once, "same_rows": calm == killed}

    def _ids(self, name: str) -> list[int]:
        shards = sorted((self._folder / name / "answers").glob("*.jsonl"))
        return [json.loads(line)["id"] for shard in shards for line in shard.read_text().splitlines()]

    def _kill(self, root: Path, process: subprocess.Popen[bytes]) -> None:
        """Kill the engine's scheduler after a quarter of the answers, and the head after half of them."""
        self._wait_for_answers(root, self._options.prompts // 4, process)
        for child in psutil.Process(process.pid).children(recursive=True):
            if "sglang::scheduler" in " ".join(child.cmdline()):
                child.kill()
        self._wait_for_answers(root, self._options.prompts // 2, process)
        log = root / "attempts" / "1" / "logs" / "head-0.log"
        os.kill(int(re.findall(r"started pid=(\d+)", log.read_text())[-1]), signal.SIGKILL)

    def _wait_for_answers(self, root: Path, count: int, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + WAIT_S
        while ((read_json(root / "status.json") or {}).get("answers") or {"done": 0})["done"] < count:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{root}: it did not reach {count} answers")
            time.sleep(0.1)

    def _engine_answers_per_s(self) -> float:
        config = load_config(self._folder / "calm" / "config.yaml")
        speaker = Speaker(config)
        template = Template(load_tokenizer(config), end_ids(config))
        questions = [self._question(template, speaker, row) for row in self._rows.read_text().splitlines()]
        timeout_s = start_timeout_s(config, read_target(config.target.path))
        with OwnEngine(config, self._folder / "engine.log", speaker.max_tokens, timeout_s) as engine:
            say: Callable[[Question], object] = engine.say
            began = time.monotonic()
            with ThreadPoolExecutor(self._options.batch_size) as pool:
                list(pool.map(say, questions))
            return len(questions) / (time.monotonic() - began)

    def _question(self, template: Template, speaker: Speaker, row: str) -> Question:
        conversation = Conversation([{"role": "user", "content": json.loads(row)["prompt"]}])
        ids, _ = template.encode(template.render(conversation, prompt=True))
        return Question(conversation, ids, speaker.sampling, self._options.max_new_tokens, speaker.stop_ids, 0)


if __name__ == "__main__":
    main()
