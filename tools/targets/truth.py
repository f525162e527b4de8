"""Computes a target's layer states and greedy answers with transformers in float32."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from specbatch.config import load_config
from specbatch.corpus import open_corpus
from specbatch.corpus.images import Image, read_image
from specbatch.drafts.base import algorithm_of
from specbatch.rundir import RunDir
from specbatch.snapshot.recording import RecordedStep, recorded_steps
from specbatch.target import read_target


def architecture_of(target: Path) -> str:
    """Return the class that a target's config.json names."""
    return str(json.loads((target / "config.json").read_text())["architectures"][0])


def load_truth(target: Path) -> Any:
    """Load the target with transformers, in float32."""
    import transformers

    return getattr(transformers, architecture_of(target)).from_pretrained(target, dtype=torch.float32).eval()


def pixels(target: Path, images: Sequence[Image]) -> dict[str, torch.Tensor]:
    """Return what the target's own processor makes of images, by the names of the model's arguments."""
    from transformers import AutoProcessor

    if not images:
        return {}
    processor = AutoProcessor.from_pretrained(target)
    opened = [PIL.Image.open(io.BytesIO(read_image(image.source))).convert("RGB") for image in images]
    made = processor(text=[processor.image_token * len(opened)], images=opened, return_tensors="pt")
    return {name: made[name] for name in ("pixel_values", "image_sizes")}


@torch.no_grad()
def states_of(model: Any, ids: torch.Tensor, seen: dict[str, torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
    """Return the embeddings and each layer's output, the last one after the final norm: float32
    ``[tokens, hidden]``.

    Args:
        seen: result of `pixels`.
    """
    output = model(input_ids=ids[None], output_hidden_states=True, **(seen or {}))
    return tuple(states[0] for states in output.hidden_states)


@torch.no_grad()
def greedy(model: Any, prompt: list[int], tokens: int, stop: int, seen: dict[str, torch.Tensor]) -> list[int]:
    """Return the most likely continuation, each token computed from the whole prefix without a cache.

    Args:
        seen: result of `pixels`.
    """
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens and (len(ids) == len(prompt) or ids[-1] != stop):
        ids.append(int(model(input_ids=torch.tensor([ids]), **seen).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def compare_rows(run: Path, target: Path, model: Any) -> float:
    """Return the largest relative difference of a recorded row from the target's own."""
    contract = algorithm_of(load_config(run / "config.yaml"), read_target(str(target))).contract
    corpus = open_corpus(RunDir(run))
    worst = 0.0
    for step in recorded_steps(run / "recordings"):
        recorded = RecordedStep(run / "recordings", step)
        for about in recorded.about[0].packs:
            pack = recorded.read(about.id)
            assert pack is not None, about
            ids = pack.tensors["input_ids"].long().split(list(pack.lengths))
            masks = pack.tensors["loss_mask"].bool().split(list(pack.lengths))
            expected: dict[str, list[torch.Tensor]] = {name: [] for name in contract.tensors}
            for number, sample, mask in zip(about.samples, ids, masks, strict=True):
                states = states_of(model, sample, pixels(target, corpus.sample(number).images))
                for name, rows in contract.rows(mask.numpy()).items():
                    layers = contract.tensors[name].layers
                    # No layers are the embeddings.
                    chosen = [-1] if layers is None else [layer + 1 for layer in layers] or [0]
                    parts = [states[number] for number in chosen]
                    expected[name].append(torch.cat(parts, -1)[torch.from_numpy(rows)])
            for name, parts in expected.items():
                truth, found = torch.cat(parts), pack.tensors[name].float()
                worst = max(worst, ((found - truth).norm(dim=1) / truth.norm(dim=1)).max().item())
    return worst
