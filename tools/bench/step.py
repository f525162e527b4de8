#!/usr/bin/env python
"""The training step alone, beside the published algorithm, on random data of a real model's shape.

    tools/bench/step.py --shape smollm2 --tokens 4096 --loss-fraction 0.33
    tools/bench/step.py --shape qwen3-8b --tokens 32768 --loss-fraction 1 --memory

Prints tokens a second, share of the device's peak and peak memory of both; the last line is JSON. The share counts the
operations that an implementation really does, so it says how well they run, not how many were saved. Each runs in a
process of its own, so that the memory of one is not counted for the other.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2])]  # so that a checkout and torch are enough

from tools.bench.step_data import SHAPES, TOY  # noqa: E402


def main() -> None:
    options = parse()
    if options.only:
        from tools.bench.step_measure import measure

        # Libraries and kernels come with their first use; what they take is not the step's.
        measure(argparse.Namespace(**{**vars(options), "shape": TOY, "tokens": 256, "repeat": 0}))
        print(json.dumps(measure(options)))
    elif options.scaling:
        scale(options)
    elif options.memory:
        count(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Ours and the published algorithm, one after the other."""
    ours, plain = run("ours"), run("plain")
    print(f"{options.shape}, {ours['tokens']} tokens, {ours['loss_share']:.0%} of them in the loss, "
          f"{options.ttt_steps} unrolled steps, {ours['device']}, {ours['dtype']}")  # fmt: skip
    for name, row in (("specbatch", ours), ("published algorithm", plain)):
        print(f"  {name:20} {row['tokens_per_s']:10.0f} tokens/s  {row['share_of_peak']:6.1%} of peak  "
              f"{row['peak_bytes'] / 2**20:8.0f} MiB")  # fmt: skip
    ratio = ours["tokens_per_s"] / plain["tokens_per_s"]
    memory = ours["peak_bytes"] / plain["peak_bytes"]
    cpu_ratio = plain["cpu_s"] / ours["cpu_s"]
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


def scale(options: argparse.Namespace) -> None:
    """Ours alone, from 1k tokens to as many as asked for: samples stay as long, so attention costs the same a token."""
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


def count(options: argparse.Namespace) -> None:
    """What ours holds on a GPU, counted without one."""
    from tools.bench.held import held

    found = held(options)
    print(f"{options.shape}, {options.tokens} tokens, {found['loss_share']:.0%} of them in the loss, "
          f"{options.ttt_steps} unrolled steps, draft's vocabulary {found['draft_vocab']}, {found['dtype']}, "
          f"recompute {options.recompute}")  # fmt: skip
    print(f"  beside weights: {found['peak_bytes'] / 1e9:.2f} GB in forward and backward, by formula "
          f"{found['predicted_bytes'] / 1e9:.2f}, and {found['pack_bytes'] / 1e9:.2f} of packs")  # fmt: skip
    print(json.dumps(found))


def power(sizes: list[int], costs: list[float]) -> float:
    """With which power of its size something's cost grows: the slope of the best line through both logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def run(only: str, *more: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], *more, "--only", only]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the pack")
    parser.add_argument("--loss-fraction", type=float, default=0.33, help="share of the tokens that are learnt")
    parser.add_argument("--draft-vocab", type=int, help="rows of the draft's head, if others than the shape's")
    parser.add_argument("--ttt-steps", type=int, default=7, help="unrolled steps")
    parser.add_argument("--mean-length", type=int, default=512, help="mean tokens of a sample")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, else bfloat16")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--repeat", type=int, default=3, help="steps after the first; the fastest counts")
    parser.add_argument("--columns-at-once", type=int, help="as training.columns_at_once")
    parser.add_argument("--recompute", choices=("none", "all_but_attention", "all"), default="none")
    parser.add_argument("--scaling", action="store_true", help="instead: ours from 1k tokens to --tokens, doubling")
    parser.add_argument(
        "--memory", action="store_true",
        help="instead: what ours holds on a GPU, counted on tensors without values, of any size on any machine",
    )  # fmt: skip
    parser.add_argument("--only", choices=("ours", "plain"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
