#!/usr/bin/env python
"""Compares the training step with the published algorithm, on random data of a real model's shape.

    tools/bench/step.py --shape smollm2 --tokens 4096 --loss-fraction 0.33
    tools/bench/step.py --shape qwen3-8b --tokens 32768 --loss-fraction 1 --memory
    tools/bench/step.py --algorithm dflash --shape smollm2 --tokens 4096 --anchors 512
    tools/bench/step.py --algorithm dflash --shape smollm2 --tokens 4096 --anchors 1024 --scaling

Prints tokens per second, share of the device's peak, and peak memory of both; the last line is JSON. The share counts
the operations that an implementation really does, so it shows how well they run, not how many were saved. Each runs in
a separate process, so that their memory is counted separately. They take turns of a few steps, and the ratio is the
median over rounds, so that other load on the machine affects both.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2])]  # so that a checkout, torch and numpy are enough

from tools.bench.step_data import SHAPES, TOY  # noqa: E402


def main() -> None:
    options = parse()
    if options.only:
        from tools.bench.step_measure import measure

        # Libraries and kernels are loaded at their first use; their memory does not belong to the step.
        measure(argparse.Namespace(**{**vars(options), "shape": TOY, "tokens": 256, "repeat": 0}))
        if options.turns:
            take_turns(options)
        else:
            print(json.dumps(with_rates(measure(options))))
    elif options.scaling:
        scale(options)
    elif options.memory:
        count(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Compare ours with the published algorithm, in turns."""
    ours, plain, ratio, cpu_ratio = measure_both(options.repeat)
    print(f"{options.shape}, {ours['tokens']} tokens, {ours['loss_share']:.0%} of them in the loss, "
          f"{passes(options)}, {ours['device']}, {ours['dtype']}")  # fmt: skip
    for name, row in (("specbatch", ours), ("published algorithm", plain)):
        print(f"  {name:20} {row['tokens_per_s']:10.0f} tokens/s  {row['share_of_peak']:6.1%} of peak  "
              f"{row['peak_bytes'] / 2**20:8.0f} MiB")  # fmt: skip
    memory = ours["peak_bytes"] / plain["peak_bytes"]
    print(f"  {ratio:.2f} times as fast ({cpu_ratio:.2f} by processor time) in {memory:.2f} of its memory; "
          f"{ours['predicted_bytes'] / 2**20:.0f} MiB by formula; "
          f"losses differ by {abs(ours['loss'] / plain['loss'] - 1):.1e}")  # fmt: skip
    print(json.dumps({
        "shape": options.shape, "tokens": ours["tokens"], "loss_fraction": ours["loss_share"], "device": ours["device"],
        "tokens_per_s": ours["tokens_per_s"], "plain_tokens_per_s": plain["tokens_per_s"], "ratio": ratio,
        "peak_bytes": ours["peak_bytes"], "plain_peak_bytes": plain["peak_bytes"],
        "predicted_bytes": ours["predicted_bytes"], "cpu_time_ratio": cpu_ratio, "share_of_peak": ours["share_of_peak"],
        "plain_share_of_peak": plain["share_of_peak"], "loss": ours["loss"], "plain_loss": plain["loss"],
    }))  # fmt: skip


def passes(options: argparse.Namespace) -> str:
    """Describe what the draft does with a token."""
    if options.algorithm == "eagle3":
        return f"{options.ttt_steps} unrolled steps"
    return f"{options.layers} layers, {options.anchors or 'all'} blocks of {options.block_size}"


def measure_both(repeat: int) -> tuple[dict[str, Any], dict[str, Any], float, float]:
    """Measure ours and the published algorithm in turns.

    Args:
        repeat: rounds after the first, which counts only if there are no others.

    Returns:
        the measurements of each, with the medians of its times, and the median ratio of the published algorithm's time
        to ours over the rounds, by the clock and by processor time.
    """
    processes = {name: start(name) for name in ("ours", "plain")}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    try:
        for _ in range(repeat + 1):
            for name, process in processes.items():
                print("turn", file=process.stdin, flush=True)
                turns[name].append(answer(name, process))
        reports = {}
        for name, process in processes.items():
            process.stdin.close()
            reports[name] = answer(name, process)
            process.wait()
    finally:
        for process in processes.values():
            process.kill()
    counted = {name: found[1:] or found for name, found in turns.items()}
    both = [
        with_rates(reports[name] | {key: statistics.median(turn[key] for turn in found) for key in found[0]})
        for name, found in counted.items()
    ]
    clock, cpu = (
        statistics.median(plain[key] / ours[key] for ours, plain in zip(*counted.values(), strict=True))
        for key in ("seconds", "cpu_s")
    )
    return both[0], both[1], clock, cpu


def start(only: str) -> subprocess.Popen[str]:
    """Start an implementation in a separate process, which takes a turn for each line that it gets."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", only, "--turns"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the next line of JSON of a process that takes turns."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"the process of {name} ended with {process.wait()}; its output is above")
    return json.loads(line)


def take_turns(options: argparse.Namespace) -> None:
    """Run in the process of `start`: print a line of JSON for each turn, and all other measurements at the end."""
    from tools.bench.step_measure import Stopwatch

    stopwatch = Stopwatch(options)
    for _ in sys.stdin:
        print(json.dumps(stopwatch.turn()), flush=True)
    print(json.dumps(stopwatch.report()), flush=True)


def with_rates(found: dict[str, Any]) -> dict[str, Any]:
    """Return the measurements with derived rates."""
    return found | {
        "tokens_per_s": found["tokens"] / found["seconds"],
        "share_of_peak": found["operations"] / found["seconds"] / found["peak_flops"],
    }


def scale(options: argparse.Namespace) -> None:
    """Measure ours from 1k to the given number of tokens; with samples of the same length, attention costs the same per
    token."""
    if options.algorithm == "dflash":
        scale_blocks(options)
        return
    sizes = [1 << n for n in range(10, options.tokens.bit_length())]
    if len(sizes) < 2:
        raise SystemExit("--scaling needs two sizes at least: --tokens 2048 or more")
    rows = [run("ours", "--tokens", str(tokens)) for tokens in sizes]
    for row in rows:
        print(f"{row['tokens']:8} tokens  {row['tokens_per_s']:10.0f} tokens/s  "
              f"{row['cpu_s'] / row['tokens'] * 1e6:8.1f} microseconds of processor time and "
              f"{row['operations'] / row['tokens'] / 1e6:8.1f} million operations a token  "
              f"{row['peak_bytes'] / 2**20:8.0f} MiB")  # fmt: skip
    seconds = [row["tokens"] / row["tokens_per_s"] for row in rows]
    print(f"time grows with the tokens to the power of {power(sizes, seconds):.2f}")
    print(json.dumps({
        "shape": options.shape, "device": rows[0]["device"], "loss_fraction": rows[-1]["loss_share"], "tokens": sizes,
        "tokens_per_s": [row["tokens_per_s"] for row in rows],
        "cpu_s_per_token": [row["cpu_s"] / row["tokens"] for row in rows],
        "operations_per_token": [row["operations"] / row["tokens"] for row in rows],
        "peak_bytes": [row["peak_bytes"] for row in rows], "power": power(sizes, seconds),
        "cpu_power": power(sizes, [row["cpu_s"] for row in rows]),
    }))  # fmt: skip


def scale_blocks(options: argparse.Namespace) -> None:
    """Measure ours from 64 to the given number of blocks per pack."""
    sizes = [1 << n for n in range(6, options.anchors.bit_length())]
    if len(sizes) < 2:
        raise SystemExit("--scaling needs two numbers of blocks at least: --anchors 128 or more")
    rows = [run("ours", "--anchors", str(anchors)) for anchors in sizes]
    for anchors, row in zip(sizes, rows, strict=True):
        print(f"{anchors:8} blocks  {row['seconds'] / anchors * 1e3:8.2f} ms a block  "
              f"{row['peak_bytes'] / 2**20:8.0f} MiB")  # fmt: skip
    peaks = [row["peak_bytes"] for row in rows]
    print(f"the most takes {max(peaks) / min(peaks):.2f} times the memory of the least")
    print(json.dumps({
        "shape": options.shape, "device": rows[0]["device"], "tokens": options.tokens, "anchors": sizes,
        "seconds": [row["seconds"] for row in rows], "peak_bytes": peaks,
    }))  # fmt: skip


def count(options: argparse.Namespace) -> None:
    """Count the memory of ours on a GPU, without one."""
    from tools.bench.held import held

    found = held(options)
    print(f"{options.shape}, {options.tokens} tokens, {found['loss_share']:.0%} of them in the loss, "
          f"{passes(options)}, draft's vocabulary {found['draft_vocab']}, {found['dtype']}, "
          f"recompute {options.recompute}")  # fmt: skip
    print(f"  besides weights: {found['peak_bytes'] / 1e9:.2f} GB in forward and backward, by formula "
          f"{found['predicted_bytes'] / 1e9:.2f}, and {found['pack_bytes'] / 1e9:.2f} of packs")  # fmt: skip
    print(json.dumps(found))


def power(sizes: list[int], costs: list[float]) -> float:
    """Return the exponent with which a cost grows: the slope of the best line through both logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def run(only: str, *more: str) -> dict[str, Any]:
    """Run `measure` in a separate process."""
    command = [sys.executable, __file__, *sys.argv[1:], *more, "--only", only]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithm", choices=("eagle3", "dflash"), default="eagle3")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the pack")
    parser.add_argument("--loss-fraction", type=float, default=0.33, help="share of the tokens that are learnt")
    parser.add_argument("--draft-vocab", type=int, help="rows of the draft's head, if others than the shape's")
    parser.add_argument("--ttt-steps", type=int, default=7, help="unrolled steps")
    parser.add_argument("--layers", type=int, default=5, help="layers of a DFlash draft")
    parser.add_argument("--block-size", type=int, default=8, help="slots of its blocks")
    parser.add_argument("--anchors", type=int, default=512, help="blocks of the pack, or a few more; 0: all")
    parser.add_argument("--mean-length", type=int, default=512, help="mean tokens of a sample")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, else bfloat16")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--repeat", type=int, default=5, help="rounds after the first, which does not count")
    parser.add_argument("--columns-at-once", type=int, help="as training.columns_at_once")
    parser.add_argument("--recompute", choices=("none", "all_but_attention", "all"), default="none")
    parser.add_argument(
        "--scaling", action="store_true",
        help="instead: ours from 1k tokens to --tokens, doubling; of dflash: from 64 blocks to --anchors",
    )  # fmt: skip
    parser.add_argument(
        "--memory", action="store_true",
        help="instead: memory of ours on a GPU, counted on tensors without values, of any size on any machine",
    )  # fmt: skip
    parser.add_argument("--only", choices=("ours", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    return options


if __name__ == "__main__":
    main()
