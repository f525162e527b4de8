#!/usr/bin/env python
"""The training step alone, beside the published algorithm, on random data of a real model's shape.

    tools/bench/step.py --shape smollm2 --tokens 4096 --loss-fraction 0.33

Prints tokens a second, share of the device's peak and peak memory of both; the last line is JSON. The share counts the
operations that an implementation really does, so it says how well they run, not how many were saved. Each runs in a
process of its own, so that the memory of one is not counted for the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2])]  # so that a checkout and torch are enough


SHAPES = {
    "smollm2": (576, 1536, 9, 3, 64, 49152, 8192),
    "llama-3.1-8b": (4096, 14336, 32, 8, 128, 128256, 32000),
    "qwen3-8b": (4096, 12288, 32, 8, 128, 151936, 32000),
    "kimi-k2.5": (7168, 18432, 64, 8, 128, 163840, 163840),
}
"""Arguments of `specbatch.training.memory.Shape`: target and draft."""
TOY, TOY_SHAPE = "toy", (64, 128, 4, 2, 16, 512, 128)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bfloat16, as the vendors state them; on other devices a large matrix product is measured instead."""


def main() -> None:
    options = parse()
    if options.only:
        # Libraries and kernels come with their first use; what they take is not the step's.
        measure(argparse.Namespace(**{**vars(options), "shape": TOY, "tokens": 256, "repeat": 0}))
        print(json.dumps(measure(options)))
    elif options.scaling:
        scale(options)
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
    parser.add_argument("--ttt-steps", type=int, default=7, help="unrolled steps")
    parser.add_argument("--mean-length", type=int, default=512, help="mean tokens of a sample")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, else bfloat16")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--repeat", type=int, default=3, help="steps after the first; the fastest counts")
    parser.add_argument("--columns-at-once", type=int, help="as training.columns_at_once")
    parser.add_argument("--recompute", choices=("none", "all_but_attention", "all"), default="none")
    parser.add_argument("--scaling", action="store_true", help="instead: ours from 1k tokens to --tokens, doubling")
    parser.add_argument("--only", choices=("ours", "plain"), help=argparse.SUPPRESS)
    return parser.parse_args()


def conversations(tokens: int, mean: int, fraction: float) -> list[list[bool]]:
    """Masks of chat-like samples: mixed lengths, turns of question and answer."""
    import random

    draw = random.Random(0)
    masks: list[list[bool]] = []
    while (left := tokens - sum(map(len, masks))) > 0:
        length = min(left, max(16, int(draw.lognormvariate(0, 0.6) * mean)))
        mask: list[bool] = []
        while len(mask) < length:
            turn = draw.randint(60, 240)
            answer = round(turn * fraction)
            mask += [False] * (turn - answer) + [True] * answer
        masks.append(mask[:length])
    return masks


def measure(options: argparse.Namespace) -> dict[str, float | str]:
    """Time one implementation in this process."""
    import torch

    from specbatch.capture import CaptureContract
    from specbatch.training.drafts.eagle3 import Eagle3, Eagle3Config, Recompute
    from specbatch.training.drafts.pack import PackTensors
    from specbatch.training.drafts.rope import Rope
    from specbatch.training.memory import Shape, Work, default_columns_at_once, step_bytes
    from tools.bench.plain_eagle3 import plain_step

    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    shape = Shape(*(TOY_SHAPE if options.shape == TOY else SHAPES[options.shape]))
    contract = CaptureContract((0, 1, 2), shape.hidden)
    config = Eagle3Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-5,
        rope=Rope(shape.head_dim, 1e5, 1 << 18),
        ttt_steps=options.ttt_steps,
        draft_ids=tuple(range(shape.draft_vocab)),
        contract=contract,
    )
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float32).to(torch.bfloat16)

    draft = Eagle3(config)
    draft.initialize(0, random(shape.vocab, shape.hidden), random(shape.vocab, shape.hidden) * 0.05)
    draft.to(device, dtype)
    draft.attach(draft.embedding.to(device), draft.target_head.to(device, dtype))
    draft.recompute = Recompute(options.recompute)
    draft.columns_at_once = options.columns_at_once or default_columns_at_once(gpu=device.type != "cpu")
    masks = [torch.tensor(mask) for mask in conversations(options.tokens, options.mean_length, options.loss_fraction)]
    states = [(random(len(mask), 3 * shape.hidden), random(len(mask), shape.hidden)) for mask in masks]
    lengths, loss_mask = tuple(map(len, masks)), torch.cat(masks)
    # What is captured (`specbatch.capture`): positions before loss tokens, and all columns before the last of them.
    targets = [mask[2:].nonzero().flatten() + 1 for mask in masks]
    pack = PackTensors(
        input_ids=torch.randint(shape.vocab, (options.tokens,), generator=generator).to(device),
        loss_mask=loss_mask,
        lengths=lengths,
        aux=torch.cat([aux[: t[-1] if len(t) else 0] for (aux, _), t in zip(states, targets, strict=True)]).to(device),
        last=torch.cat([last[t] for (_, last), t in zip(states, targets, strict=True)]).to(device),
    )
    states = [(aux.to(device), last.to(device)) for aux, last in states]
    weights = 0.8 ** torch.arange(options.ttt_steps, device=device, dtype=torch.float32) / options.tokens

    def step() -> float:
        if options.only == "plain":
            return plain_step(draft, pack, states, weights)
        loss = draft(pack, weights)[0].sum()
        loss.backward()
        return loss.item()

    work = Work(
        tokens=options.tokens, ttt_steps=options.ttt_steps, columns_at_once=draft.columns_at_once,
        recompute=options.recompute, value_bytes=dtype.itemsize, gpu=device.type != "cpu",
    )  # fmt: skip
    # Sums become gradients, but for that of the first projection, which is made apart.
    first_gradient = shape.first * dtype.itemsize
    cuda = device.type == "cuda"
    before = 0 if cuda else resident("VmRSS", reset=True)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    counter = operations()
    best = cpu = float("inf")
    for number in range(options.repeat + 1):
        draft.zero_grad()
        begun, begun_cpu = time.perf_counter(), time.process_time()
        with contextlib.nullcontext() if number or cuda else counter:
            loss = step()
        if cuda:
            torch.cuda.synchronize()
        best, cpu = min(best, time.perf_counter() - begun), min(cpu, time.process_time() - begun_cpu)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    if cuda:
        # Nothing is compiled while operations are counted, so that step is neither timed nor in the peak.
        draft.zero_grad()
        with countable_attention(), counter:
            step()
    return {
        "tokens": options.tokens,
        "loss_share": loss_mask.float().mean().item(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."),
        "loss": loss,
        "tokens_per_s": options.tokens / best,
        "operations": counter.total,
        "cpu_s": cpu,
        "share_of_peak": counter.total / best / peak_flops(device, dtype),
        "peak_bytes": peak - before,
        "predicted_bytes": sum(step_bytes(shape, work).values()) + first_gradient,
    }


def resident(kind: str, *, reset: bool = False) -> int:
    """Bytes of this process in memory: ``VmRSS`` now, ``VmHWM`` at most since the last reset (Linux).

    What is made ready for the step takes more at times than what is left of it, so the most ever would hide the step's.
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) << 10


@contextlib.contextmanager
def countable_attention():
    """The CPU's attention on a GPU, in large blocks: FlexAttention is one operation, which can't be looked into."""
    from specbatch.training import blockwise, flex, memory

    kept = flex.attend, memory.CPU_BLOCK_SCORES
    flex.attend, memory.CPU_BLOCK_SCORES = blockwise.attend, 1 << 28
    try:
        yield
    finally:
        flex.attend, memory.CPU_BLOCK_SCORES = kept


def operations():
    """Counts floating point operations. torch's own counter follows modules, too, and then fails within a gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import addmm_flop, flop_registry

    class Operations(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            packet = func._overloadpacket
            count = addmm_flop if packet is torch.ops.aten.addmm_ else flop_registry.get(packet)
            if count is not None:
                self.total += count(*args, **(kwargs or {}), out_val=result)
            return result

    import torch

    return Operations()


def peak_flops(device, dtype) -> float:
    """Of the device: stated where it is known, else that of a matrix product."""
    import torch

    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name()
        for known, flops in PEAK_FLOPS.items():
            if known in name:
                return flops
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
