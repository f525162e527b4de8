"""A small run: the tiny random target on real SGLang, real Mooncake and real torchtitan, in many small steps."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specbatch.rundir import RunDir
from specbatch.snapshot.folder import read_manifest, snapshot_path
from specbatch.snapshot.reading import read_tensors
from specbatch.training.metrics_file import last_step

CONVERSATIONS = 400
WORDS = "sun rain warm cold and or we like to walk by sea in May take a coat".split()
SAME = ("step", "loss", "losses", "accuracy", "grad_norm", "learning_rate", "tokens", "loss_tokens", "void_packs")
"""What must not depend on what happened to a run."""


@dataclass(frozen=True)
class Result:
    """What a run came to, to the last bit."""

    metrics: tuple[str, ...]
    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]
    draft: bytes

    def differences(self, other: Result) -> list[str]:
        """Where two results differ, in words; empty if they are equal."""
        found = []
        if len(self.metrics) != len(other.metrics):
            found.append(f"metrics.jsonl has {len(self.metrics)} and {len(other.metrics)} lines")
        pairs = enumerate(zip(self.metrics, other.metrics, strict=False), 1)
        found += [f"line {n} of metrics.jsonl: {a} and {b}" for n, (a, b) in pairs if a != b][:1]
        if self.tensors.keys() != other.tensors.keys():
            found.append("the last snapshots have other tensors")
        found += [
            f"{name} of the last snapshot differs"
            for name in self.tensors.keys() & other.tensors.keys()
            if not _same_bits(self.tensors[name], other.tensors[name])
        ]
        if self.values != other.values:
            found.append(f"the last snapshots say {self.values} and {other.values}")
        if self.draft != other.draft:
            found.append("the exported drafts differ")
        return found


def write_run(folder: Path, target: Path, steps: int, prompts: int = 0) -> Path:
    """Write conversations and a configuration; returns the configuration's path. The run is ``folder / "run"``."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    for name, count in (("talks", CONVERSATIONS), ("others", 6)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                ask, answer = (" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(2))
                messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": messages}) + "\n")
    config, cache = folder / "run.yaml", folder.parent / "cache"
    config.write_text(
        f"""
run: {{dir: {json.dumps(str(folder / "run"))}, seed: 3, log_interval_s: 5, stall_timeout_s: 120, max_restarts: 5}}
target: {{path: {json.dumps(str(target))}}}
data: {{train: [talks.jsonl], heldout: [others.jsonl], max_tokens: 128, workers: 1,
  cache_dir: {json.dumps(str(cache))}}}
draft: {{ttt_steps: 3, vocab_size: 64}}
training: {{ranks: 2, threads: 1, tokens_per_pack: 128, packs_per_step: 4, epochs: 20, max_steps: {steps},
  dtype: float32, learning_rate: 1e-3, warmup_steps: 2, max_restarts: 5}}
inference: {{threads: 1, deterministic: true, heartbeat_s: 1, max_restarts: 5}}
store: {{bytes_per_rank: 16MiB}}
snapshot: {{interval_steps: 5}}
evaluate: {{prompts: {prompts}, max_new_tokens: 8}}
"""
    )
    return config


def result_of(run_dir: RunDir) -> Result:
    """Read what a complete run left."""
    rows = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    last = snapshot_path(run_dir.snapshots, last_step(run_dir.metrics))
    return Result(
        metrics=tuple(json.dumps([row[key] for key in SAME]) for row in rows),
        tensors=read_tensors(last),
        values=read_manifest(last).values,
        draft=(run_dir.export / "model.safetensors").read_bytes(),
    )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8)) if a.ndim else a.item() == b.item()
