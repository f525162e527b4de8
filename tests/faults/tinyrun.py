"""A small run: the tiny random target on real SGLang, real Mooncake and real torchtitan, in many small steps."""

from __future__ import annotations

import json
from pathlib import Path

from tests.smalltalk import write_smalltalk

CONVERSATIONS = 400


def write_run(folder: Path, target: Path, steps: int, prompts: int = 0) -> Path:
    """Write conversations and a configuration; returns the configuration's path. The run is ``folder / "run"``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_smalltalk(folder, CONVERSATIONS, 3, 12)
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
snapshot: {{interval: 5}}
evaluate: {{prompts: {prompts}, max_new_tokens: 8}}
"""
    )
    return config
