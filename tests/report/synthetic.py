"""Run directories that look like those of real runs, of any length, with any fault planted. No engine is started."""

from __future__ import annotations

import datetime
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from specbatch.rundir import RunDir, write_json

TERMS = 3
PACKS, TOKENS, STEP_S = 4, 2000, 0.8
BEGAN = 1_790_000_000.0
ANSWER = {
    "prompt": "Is </script><img src=x onerror=alert(1)> a tag? 世界",
    "steps": [
        {"tokens": ["It"], "accepted": 0},
        {"tokens": [" is", " a", " tag", ","], "accepted": 3},
        {"tokens": [" </script>", " ends"], "accepted": 1},
        {"tokens": [" a"], "accepted": 0},
        {"tokens": [" script", " there", "."], "accepted": 2},
    ],
}

DIFFERENCES = [
    {"prompt": 3, "position": 17, "plain": 5, "speculative": 9, "logit_gap": 0.012, "verdict": "rounding"},
    {"prompt": 4, "position": 2, "plain": 5, "speculative": None, "logit_gap": None, "verdict": "wrong"},
]
SWEEP = {
    "interval": "95 %, bootstrap over prompts",
    "points": [
        {
            "set": "<b>set</b>", "batch_size": batch_size, "draft_tokens": draft_tokens, "prompts": 8,
            "output_tokens": 400, "seconds": 4.0 / speed, "tokens_per_s": 100.0 * speed, "speed_up": speed_up,
            "tokens_per_s_request": 50.0, "first_token_s": 0.02,
            **({
                "acceptance_length": 2.31, "acceptance_length_interval": [2.1, 2.52],
                "acceptance_rate": [0.7, 0.4, 0.2],
                "acceptance_rate_interval": [[0.66, 0.74], [0.35, 0.45], [0.1, 0.3]]
            } if draft_tokens else {}),
        }
        for batch_size, draft_tokens, speed, speed_up in (
            (1, 0, 1, 1.0), (1, 3, 2, 2.0), (8, 0, 2, 1.0), (8, 3, 1, 0.5)
        )
    ],
    "best": {
        name: {
            "batch_size": batch_size, "draft_tokens": draft_tokens, "tokens_per_s": 200.0, "speed_up": speed_up,
            "serve": {"sglang": "python -m sglang.launch_server", "vllm": "vllm serve"},
        }
        for name, batch_size, draft_tokens, speed_up in (("latency", 1, 3, 2.0), ("throughput", 8, 0, 1.0))
    },
}  # fmt: skip


def make_run(
    root: Path,
    steps: int = 300,
    *,
    every: int = 20,
    seed: int = 0,
    config: dict[str, dict[str, Any]] | None = None,
    reach: float = 0.62,
    wait: float = 0.05,
    loss_share: float = 0.6,
    attempts: int = 2,
    evaluation: dict[str, Any] | None = None,
    lines: dict[int, dict[str, Any]] | None = None,
    held_out: dict[int, dict[str, Any]] | None = None,
    events: bool = True,
    terms: list[str] | None = None,
) -> RunDir:
    """Write a run directory.

    Args:
        every: steps between two evaluations; 0: none.
        config: changes, by section.
        reach: accuracy of the first term that it comes to.
        wait: share of each step that trainers wait.
        loss_share: share of the tokens that enter the loss.
        attempts: the run was preempted between them.
        evaluation: changes of ``evaluation.json``.
        lines: changes of single metrics lines, by step.
        held_out: changes of single evaluations, by step.
        terms: names of the terms, which lines tell.
    """
    root.mkdir(parents=True)
    run = RunDir(root)
    rng = random.Random(seed)
    _write_config(run, config or {})
    counts = np.array([10_000 // (token + 1) for token in range(4000)])
    corpus = root / "prepared"
    corpus.mkdir()
    np.save(corpus / "loss_token_counts.npy", counts)
    train = {
        "path": str(corpus),
        "samples": steps * 20,
        "tokens": steps * TOKENS,
        "loss_tokens": int(steps * TOKENS * loss_share),
    }
    write_json(run.corpus, {"train": train, "heldout": None, "tokenizer_size": 4000})
    write_json(
        run.provenance,
        {
            "specbatch": "0.1.0", "git_revision": "f460f34b2f9a7c", "time": "2026-11-20T08:00:00+00:00",
            "packages": {"torch": "2.14.1", "sglang": "0.5.23"}, "target": "models/Tiny-8B-Instruct",
            "target_fingerprint": "tiny", "corpus_fingerprint": "c0ffee", "plan": {"packs_per_step": PACKS},
        },
    )  # fmt: skip
    with run.metrics.open("w") as file:
        for step in range(1, steps + 1):
            line = _line(step, steps, rng, reach, wait, loss_share, run.config)
            if every and step % every == 0:
                line["evaluation"] = _held_out(step, steps, reach) | (held_out or {}).get(step, {})
            if terms:
                line["terms"] = terms
            file.write(json.dumps(line | (lines or {}).get(step, {})) + "\n")
    _write_attempts(run, steps, attempts, wait, events)
    measured = {
        "acceptance_length": 2.31, "acceptance_length_definition": "1 + correct drafts / verify steps",
        "acceptance_rate": [reach + 0.03, 0.41, 0.26], "prompts": 40, "identical": 40, "tokens_per_s_plain": 41.0,
        "tokens_per_s_speculative": 77.9, "draft_tokens": 3, "verify_steps": 900, "batch_size": 16, "dtype": "bfloat16",
        "device": "cuda", "training_accuracy": [reach, 0.5, 0.4], "sglang": "0.5.23", "note": None, "warnings": [],
        "answers": [ANSWER],
    }  # fmt: skip
    write_json(run.evaluation, measured | (evaluation or {}))
    return run


def _write_config(run: RunDir, changes: dict[str, dict[str, Any]]) -> None:
    import yaml

    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run.root), "name": run.root.name, "seed": 0},
        "target": {"path": "models/Tiny-8B-Instruct"},
        "data": {"train": ["train.jsonl"], "heldout": ["heldout.jsonl"], "loss_on": "assistant"},
        "draft": {"algorithm": "eagle3", "ttt_steps": TERMS, "vocab_size": 3000},
        "training": {"learning_rate": 1e-4, "warmup_steps": 20, "max_grad_norm": 0.5, "packs_per_step": PACKS},
        "inference": {"engines": 2},
    }
    for section, fields in changes.items():
        values[section] = values.get(section, {}) | fields
    run.config.write_text(yaml.safe_dump(values))


def _line(
    step: int, steps: int, rng: random.Random, reach: float, wait: float, loss_share: float, config: Path
) -> dict[str, Any]:
    learnt = 1 - math.exp(-6 * step / steps)
    accuracy = [max(0.0, reach * learnt * 0.82**k + rng.gauss(0, 0.02)) for k in range(TERMS)]
    losses = [2.2 + 6.5 * (1 - learnt) + 0.3 * k + rng.gauss(0, 0.08) for k in range(TERMS)]
    seconds = STEP_S * (1 + 0.1 * rng.random())
    return {
        "step": step, "loss": sum(0.8**k * loss for k, loss in enumerate(losses)), "losses": losses,
        "accuracy": accuracy, "grad_norm": 0.2 + 3 * (1 - learnt) + 0.1 * rng.random(),
        "learning_rate": 1e-4 * min(1.0, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps)), "tokens": TOKENS,
        "loss_tokens": int(TOKENS * loss_share), "void_packs": 0, "seconds": seconds, "wait_s": wait * seconds,
        "tokens_per_s": TOKENS / seconds, **({"snapshot_s": 0.05} if step % 100 == 1 and step > 1 else {}),
    }  # fmt: skip


def _held_out(step: int, steps: int, reach: float) -> dict[str, Any]:
    learnt = 1 - math.exp(-6 * step / steps)
    return {
        "loss": 5.5 + 14 * (1 - learnt), "losses": [2.3 + 6.5 * (1 - learnt)] * TERMS,
        "accuracy": [reach * learnt * 0.8**k for k in range(TERMS)], "acceptance_length": 1 + 1.3 * learnt,
        "accepted": [10, 5, 3, 1], "packs": 4, "loss_tokens": 3000, "seconds": 0.6,
    }  # fmt: skip


def _write_attempts(run: RunDir, steps: int, attempts: int, wait: float, events: bool) -> None:
    now = BEGAN
    for attempt in range(1, attempts + 1):
        write_json(run.jobs / f"{700 + attempt}.json", {"id": 700 + attempt, "kind": "run", "submitted": now - 90.0})
        write_json(
            run.began(attempt),
            {"number": attempt, "began": now, "host": "n1", "pid": 1, "pid_began": 0.0, "job": 700 + attempt,
             "restart": 0, "nodes": {"head": ["n1"], "inference": ["n2", "n3"], "training": ["n4"]}},
        )  # fmt: skip
        first, last = (attempt - 1) * steps // attempts + 1, attempt * steps // attempts
        lines: list[str] = []
        now = _attempt_events(lines, now + 40.0, max(1, first - 3) if attempt > 1 else first, last, wait, attempt)
        state = "completed" if attempt == attempts else "stopped"
        if events:
            run.events(attempt).write_text("".join(lines))
        status = {
            "state": state, "stage": "done", "step": last, "steps": steps, "attempt": attempt,
            "why": "" if state == "completed" else "SIGTERM: the job is preempted", "began": _iso(now),
            "updated": _iso(now + 20),
        }  # fmt: skip
        write_json(run.last_status(attempt), status)
        write_json(run.status, status)
        now += 300.0


def _attempt_events(lines: list[str], now: float, first: int, last: int, wait: float, attempt: int) -> float:
    def tell(event: str, at: float, **facts: object) -> None:
        lines.append(json.dumps({"time": _iso(at), "event": event, **facts}) + "\n")

    tell("world", now, ranks=2, step=first - 1, generation=0)
    engines = [f"engine-{task}-a" for task in range(2)]
    for engine in engines:
        tell("engine", now, engine=engine)
    busy = STEP_S * (0.95 if wait > 0.1 else 0.6)
    for step in range(first, last + 1):
        for place in range(PACKS):
            pack = (0, (step - 1) * PACKS + place)
            engine = engines[place % 2]
            at = now + (place // 2 + 1) * STEP_S / 2
            tell("stored", at, engine=engine, claim=step * 10 + place, pack=pack, bytes=6 << 20, seconds=busy / 2)
        now += STEP_S * 1.05
        if step == (first + last) // 2:
            tell("silent", now, engine=engines[0], claims=[1])
            tell("world", now, ranks=2, step=step - 1, generation=1)
        else:
            tell("trained", now, step=step)
    if attempt == 1:
        tell("drain", now, why="SIGTERM")
    return now


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
