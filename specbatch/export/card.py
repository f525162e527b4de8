"""Writes the README of an exported draft: a description, and the commands that serve it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from specbatch.evaluation.history import evaluation_text
from specbatch.rundir import read_json, write_json, write_whole

ABOUT = "specbatch.json"
"""File with an export's origin and measurements; only a directory that has it is ever replaced."""
_MEASURED = ("acceptance_length", "draft_tokens", "prompts", "identical", "dtype", "sglang")


def model_card(about: dict[str, Any], config: dict[str, Any]) -> str:
    """Return Markdown with the hub's metadata on top.

    Args:
        about: ``specbatch.json``.
        config: ``config.json``.
    """
    target, algorithm = about["target"], about["algorithm"]
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [speculative-decoding, {algorithm}]",
        *([] if target.startswith("/") else [f"base_model: {target}"]),
        "---",
        "",
        f"# {about['title']} draft for {target.rstrip('/').rsplit('/', 1)[-1]}",
        "",
        f"Trained by specbatch {about['specbatch']}, run `{about['run']}`, optimizer step {about['step']}, from the",
        f"hidden states of `{target}` (fingerprint `{about['target_fingerprint']}`).",
        *_vocabulary(config),
    ]
    accuracy = [f"{a:.3f}" if a is not None else "-" for a in about["training_accuracy"] or []]
    if accuracy:
        lines += ["", f"Accuracy in that step's training, by proposed token: {', '.join(accuracy)}."]
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
        *_commands(target, about["serve"]),
        "```",
    ]
    if about.get("sglang_needs_specbatch"):
        lines += [
            "",
            "SGLang's own class for this target gives drafts other states than the outputs of its layers, from which",
            "this one has learnt. Install specbatch with SGLang: its plugin repairs the class.",
        ]
    if "speculators_config" in config:
        lines += ["", "`speculators` loads the directory with `SpeculatorModel.from_pretrained`."]
    if note := about.get("note"):
        lines += ["", note]
    return "\n".join(lines) + "\n"


def _vocabulary(config: dict[str, Any]) -> list[str]:
    if "draft_vocab_size" not in config:
        return []
    return [f"Its head has {config['draft_vocab_size']} of the target's {config['vocab_size']} tokens."]


def _commands(target: str, serve: dict[str, Any]) -> list[str]:
    """Return shell commands that serve the draft, for each engine that supports it."""
    lines = []
    if sglang := serve.get("sglang"):
        options = [f"--{name.replace('_', '-')} {value}" for name, value in sglang.items()]
        lines += [
            f"python -m sglang.launch_server --model-path {shlex.quote(target)} \\",
            f"    --speculative-draft-model-path DRAFT {' '.join(options)}",
        ]
    if vllm := serve.get("vllm"):
        lines += [
            f"vllm serve {shlex.quote(target)} \\",
            f"    --speculative-config '{json.dumps({**vllm, 'model': 'DRAFT'})}'",
        ]
    return lines


def tell_measured(draft: Path, evaluation: dict[str, Any]) -> None:
    """Write the measurements of a draft into its directory, if specbatch wrote that directory.

    Args:
        evaluation: result of `specbatch.evaluation.serving.evaluate`.
    """
    about = read_json(draft / ABOUT)
    if about is None or "serve" not in about:  # written by another program, or by a version without this
        return
    about["evaluation"] = {name: evaluation[name] for name in _MEASURED}
    write_json(draft / ABOUT, about)
    config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    write_whole(draft / "README.md", model_card(about, config).encode())
