"""The README of an exported draft: what it is, and the commands that serve it."""

from __future__ import annotations

import shlex
from typing import Any


def model_card(about: dict[str, Any], config: dict[str, Any]) -> str:
    """Markdown with the hub's metadata on top.

    Args:
        about: ``specbatch.json``.
        config: ``config.json``.
    """
    target, tokens = about["target"], about["draft_tokens"]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [speculative-decoding, eagle3]",
        *([] if target.startswith("/") else [f"base_model: {target}"]),
        "---",
        "",
        f"# EAGLE-3 draft for {target.rstrip('/').rsplit('/', 1)[-1]}",
        "",
        f"Trained by specbatch {about['specbatch']}, run `{about['run']}`, optimizer step {about['step']}, from the",
        f"hidden states of `{target}` (fingerprint `{about['target_fingerprint']}`).",
        f"Its head has {config['draft_vocab_size']} of the target's {config['vocab_size']} tokens.",
    ]
    accuracy = [f"{a:.3f}" if a is not None else "-" for a in about["training_accuracy"] or []]
    if accuracy:
        lines += ["", f"Accuracy of the unrolled steps in that step's training: {', '.join(accuracy)}."]
    lines += [
        "",
        "Serve it, with this directory as `DRAFT`:",
        "",
        "```bash",
        f"python -m sglang.launch_server --model-path {shlex.quote(target)} --speculative-algorithm EAGLE3 \\",
        f"    --speculative-draft-model-path DRAFT --speculative-num-steps {tokens} --speculative-eagle-topk 1 \\",
        f"    --speculative-num-draft-tokens {tokens + 1}",
        f"vllm serve {shlex.quote(target)} \\",
        f'    --speculative-config \'{{"method": "eagle3", "model": "DRAFT", "num_speculative_tokens": {tokens}}}\'',
        "```",
    ]
    if "speculators_config" in config:
        lines += ["", "`speculators` loads the directory with `SpeculatorModel.from_pretrained`."]
    return "\n".join(lines) + "\n"
