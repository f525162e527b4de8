"""Acceptance and speed over draft tokens, requests at once and sets of prompts, and the settings to serve.

Each point keeps its number of requests in flight: a new one starts when one ends. Answers are streamed, to measure the
time to the first token.
"""

from __future__ import annotations

import json
import shlex
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from specbatch.config import Config
from specbatch.drafts.base import Algorithm
from specbatch.drafts.sglang import CHAIN_ALGORITHM
from specbatch.errors import RunError, UserError
from specbatch.evaluation.engines import Questions, Subject, answers_of, sampling
from specbatch.evaluation.statistics import acceptance_length, acceptance_rate, intervals
from specbatch.inference.server import RequestRefused, SGLangServer

INTERVAL = "95 %, bootstrap over prompts"
Point = dict[str, Any]
"""A measurement, as in ``evaluation.json``; one of plain decoding has ``draft_tokens`` 0."""


def check_sweep(config: Config, algorithm: Algorithm) -> list[str]:
    """Check a sweep's settings before anything starts.

    Returns:
        warnings.

    Raises:
        UserError: a setting can't be measured.
    """
    sweep, given = config.evaluate.sweep, config.inference.sglang.get("max_running_requests")
    largest = max([config.evaluate.batch_size, *sweep.batch_sizes])
    if given is not None and largest > given:
        key = "sweep.batch_sizes" if largest in sweep.batch_sizes else "batch_size"
        raise UserError(
            f"evaluate.{key}: {largest}: the engine decodes inference.sglang.max_running_requests: {given} at once; "
            "raise that, or lower this"
        )
    deepest, trained = max([config.evaluate.draft_tokens, *sweep.draft_tokens]), algorithm.proposals
    key = "sweep.draft_tokens" if deepest in sweep.draft_tokens else "draft_tokens"
    served = algorithm.files.serve("sglang", 1) or {}
    told = f"evaluate.{key}: {deepest}: the draft is trained to propose {trained} at a time"
    if served.get("speculative_algorithm") == CHAIN_ALGORITHM:
        return [f"{told}; later proposals are seldom accepted"] if deepest > trained else []
    if deepest > trained:
        raise UserError(f"{told}, and has no more; give at most {trained}")
    return [f"{told}; a shorter block costs the same pass"] if deepest < trained else []


def check_counts(subject: Subject, questions: Questions) -> None:
    """Check that each set has a prompt for each request at once.

    Raises:
        UserError: one has fewer.
    """
    if not subject.sweeps:
        return
    for name, prompts in questions.items():
        if subject.batch_sizes[-1] > len(prompts):
            raise UserError(
                f"evaluate.sweep.batch_sizes: {subject.batch_sizes[-1]} requests at once are more than the "
                f"{len(prompts)} prompts of {name}; give more (evaluate.prompts), or fewer requests"
            )


def measure_points(server: SGLangServer, subject: Subject, questions: Questions, draft_tokens: int) -> list[Point]:
    """All points of one engine."""
    return [
        {
            "set": name,
            "draft_tokens": draft_tokens,
            "batch_size": batch_size,
            **_measure(server, subject, prompts, batch_size, draft_tokens),
        }
        for batch_size in subject.batch_sizes
        for name, prompts in questions.items()
    ]


def _measure(
    server: SGLangServer, subject: Subject, prompts: list[list[int]], batch_size: int, draft_tokens: int
) -> Point:
    chosen = sampling(subject.settings, subject.shape)

    def ask(prompt: list[int]) -> tuple[float, float, dict[str, Any]]:
        begun = time.monotonic()
        first_s, result = server.generate_timed({"input_ids": prompt, "sampling_params": chosen})
        return first_s, time.monotonic() - begun, result

    started = time.monotonic()
    try:
        with ThreadPoolExecutor(batch_size) as pool:
            told = list(pool.map(ask, prompts))
    except RequestRefused as error:
        raise RunError(f"SGLang refused the sweep's prompts: {error}; its log: {server.log}") from error
    found = answers_of(server, [result for _, _, result in told], time.monotonic() - started, draft_tokens)
    speeds = [len(tokens) / seconds for tokens, (_, seconds, _) in zip(found.tokens, told, strict=True)]
    point: Point = {
        "prompts": len(prompts),
        "output_tokens": found.count,
        "seconds": found.seconds,
        "tokens_per_s": found.count / found.seconds,
        "tokens_per_s_request": statistics.median(speeds),
        "first_token_s": statistics.median(first_s for first_s, _, _ in told),
    }
    if draft_tokens and sum(found.histogram):
        sure = intervals(found.histograms)
        point |= {
            "acceptance_length": acceptance_length(found.histogram),
            "acceptance_rate": acceptance_rate(found.histogram, draft_tokens),
            "acceptance_length_interval": sure[0] if sure else None,
            "acceptance_rate_interval": sure[1] if sure else None,
            "verify_steps": sum(found.histogram),
        }
    return point


def sweep_document(subject: Subject, points: Sequence[Point]) -> dict[str, Any]:
    """The entry of ``evaluation.json`` for a sweep: all points, the best settings, and the commands that serve them."""
    plain = {(each["set"], each["batch_size"]): each for each in points if not each["draft_tokens"]}
    told = [
        {**each, "speed_up": each["tokens_per_s"] / plain[each["set"], each["batch_size"]]["tokens_per_s"]}
        for each in sorted(points, key=lambda each: (each["set"], each["batch_size"], each["draft_tokens"]))
    ]
    best = best_settings(points)
    for found in best.values():
        found["serve"] = serve_commands(subject, found["draft_tokens"], found["batch_size"])
    return {"interval": INTERVAL, "points": told, "best": best}


def best_settings(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """The fastest settings over all sets: ``latency`` with the fewest requests at once, ``throughput`` with any
    number."""
    settings = sorted({(each["batch_size"], each["draft_tokens"]) for each in points})

    def speed(setting: tuple[int, int]) -> float:
        mine = [each for each in points if (each["batch_size"], each["draft_tokens"]) == setting]
        return sum(each["output_tokens"] for each in mine) / sum(each["seconds"] for each in mine)

    fewest = [setting for setting in settings if setting[0] == settings[0][0]]
    chosen = {"latency": max(fewest, key=speed), "throughput": max(settings, key=speed)}
    return {
        name: {
            "batch_size": setting[0],
            "draft_tokens": setting[1],
            "tokens_per_s": speed(setting),
            "speed_up": speed(setting) / speed((setting[0], 0)),
        }
        for name, setting in chosen.items()
    }


def serve_commands(subject: Subject, draft_tokens: int, batch_size: int) -> dict[str, str]:
    """The shell commands that serve a setting, by engine."""
    target, draft, ranks = (
        str(subject.shape.path),
        str(subject.draft.resolve()),
        subject.config.inference.tensor_parallel,
    )
    sglang: dict[str, Any] = {"model_path": target, "max_running_requests": batch_size}
    vllm = ["vllm", "serve", target, "--max-num-seqs", str(batch_size)]
    if ranks > 1:
        sglang["tp_size"], vllm = ranks, [*vllm, "--tensor-parallel-size", str(ranks)]
    if subject.settings.dtype != "auto":
        sglang["dtype"], vllm = subject.settings.dtype, [*vllm, "--dtype", subject.settings.dtype]
    if draft_tokens:
        sglang |= {"speculative_draft_model_path": draft, **subject.served("sglang", draft_tokens)}
        speculation = {**subject.served("vllm", draft_tokens), "model": draft}
        vllm += ["--speculative-config", json.dumps(speculation)]
    words = [word for name, value in sglang.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return {
        "sglang": shlex.join(["python", "-m", "sglang.launch_server", *words]),
        "vllm": shlex.join(vllm),
    }


def sweep_lines(sweep: dict[str, Any]) -> list[str]:
    """The sweep as text: a table, and the best settings with the commands that serve them."""
    head = ["set", "at once", "drafts", "tokens/s", "speed-up", "a request", "first token", "acceptance length"]
    rows = [head]
    for each in sweep["points"]:
        length, sure = each.get("acceptance_length"), each.get("acceptance_length_interval")
        told = "" if length is None else f"{length:.2f}" + (f" ({sure[0]:.2f} to {sure[1]:.2f})" if sure else "")
        cells = [each["set"], str(each["batch_size"]), str(each["draft_tokens"] or "none")]
        cells += [f"{each[name]:.{digits}f}" for name, digits in (("tokens_per_s", 1), ("speed_up", 2))]
        cells += [f"{each['tokens_per_s_request']:.1f}", f"{each['first_token_s']:.3f} s", told]
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(f"intervals: {sweep['interval']}")
    for name, best in sweep["best"].items():
        drafts = f"{best['draft_tokens']} draft tokens" if best["draft_tokens"] else "no draft"
        lines.append(
            f"best {name}: {drafts} with {best['batch_size']} at once, {best['tokens_per_s']:.1f} tokens/s, "
            f"{best['speed_up']:.2f} of plain decoding"
        )
        lines += [f"  {command}" for command in best["serve"].values()]
    return lines
