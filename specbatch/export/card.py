"""The README of an exported draft: what it is, and the commands that serve it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from specbatch.evaluations import evaluation_text
from specbatch.rundir import read_json, write_json, write_whole
from specbatch.training.drafts import files

ABOUT = "specbatch.json"
"""Where an export comes from, and what it was measured to do; only a directory that has it is ever replaced."""
_MEASURED = ("acceptance_length", "draft_tokens", "prompts", "identical", "dtype", "sglang")


def model_card(about: dict[str, Any], config: dict[str, Any]) -> str:
    """Markdown with the hub's metadata on top.

    Args:
        about: ``specbatch.json``.
        config: ``config.json``.
    """
    target, tokens, algorithm = about["target"], about["draft_tokens"], about["algorithm"]
    title, sglang = files(algorithm).TITLE, files(algorithm).SGLANG
    vllm = json.dumps({"method": algorithm, "model": "DRAFT", "num_speculative_tokens": tokens})
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sglang.items())
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [speculative-decoding, {algorithm}]",
        *([] if target.startswith("/") else [f"base_model: {target}"]),
        "---",
        "",
        f"# {title} draft for {target.rstrip('/').rsplit('/', 1)[-1]}",
        "",
        f"Trained by specbatch {about['specbatch']}, run `{about['run']}`, optimizer step {about['step']}, from the",
        f"hidden states of `{target}` (fingerprint `{about['target_fingerprint']}`).",
        f"Its head has {config['draft_vocab_size']} of the target's {config['vocab_size']} tokens.",
    ]
    accuracy = [f"{a:.3f}" if a is not None else "-" for a in about["training_accuracy"] or []]
    if accuracy:
        lines += ["", f"Accuracy of the unrolled steps in that step's training: {', '.join(accuracy)}."]
    if about.get("heldout"):
        lines += ["", f"On held-out data, from stored hidden states: {evaluation_text(about['heldout'])}."]
    if measured := about.get("evaluation"):
        lines += [
            "",
            f"**Acceptance length {measured['acceptance_length']:.2f}** of at most {measured['draft_tokens'] + 1}, by "
            f"greedy decoding of {measured['prompts']} held-out prompts in SGLang {measured['sglang']} "
            f"({measured['dtype']}); output identical to plain decoding on {measured['identical']} of them.",
        ]
    lines += [
        "",
        "Serve it, with this directory as `DRAFT`:",
        "",
        "```bash",
        f"python -m sglang.launch_server --model-path {shlex.quote(target)} {options} \\",
        f"    --speculative-draft-model-path DRAFT --speculative-num-steps {tokens} \\",
        f"    --speculative-num-draft-tokens {tokens + 1}",
        f"vllm serve {shlex.quote(target)} \\",
        f"    --speculative-config '{vllm}'",
        "```",
    ]
    if "speculators_config" in config:
        lines += ["", "`speculators` loads the directory with `SpeculatorModel.from_pretrained`."]
    return "\n".join(lines) + "\n"


def tell_measured(draft: Path, evaluation: dict[str, Any]) -> None:
    """Put what was measured of a draft into its directory, if specbatch wrote that.

    Args:
        evaluation: as `specbatch.evaluate.evaluate` gives it.
    """
    about = read_json(draft / ABOUT)
    if about is None or "algorithm" not in about:  # of others, or of a version that did not say it
        return
    about["evaluation"] = {name: evaluation[name] for name in _MEASURED}
    write_json(draft / ABOUT, about)
    config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    write_whole(draft / "README.md", model_card(about, config).encode())
