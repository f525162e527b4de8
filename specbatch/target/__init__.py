"""Describes the target model from its directory: shape, RoPE, special tokens, embedding and head.

`read_target` refuses a target for which specbatch would train a wrong draft, before anything starts, because the loss
would look plausible. Nothing here imports torch until a tensor is read, or transformers unless config.json leaves out
defaults of its class.

- `configuration`: config.json, and the defaults that it leaves out;
- `positions`: RoPE and the longest context;
- `layers`: experts, and the kinds of attention;
- `logits`: changes between head and softmax;
- `matrices`: embedding and head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbatch.errors import UserError
from specbatch.target.configuration import language_config, language_part, read_json
from specbatch.target.layers import AttentionLayers, Experts, attention_of, experts_of
from specbatch.target.logits import PLAIN, Logits, logits_of
from specbatch.target.matrices import (
    bias_name,
    embedding,
    embedding_name,
    head_bias,
    head_dtype,
    head_name,
    lm_head,
    stored_head,
)
from specbatch.target.positions import max_positions, rope_of

if TYPE_CHECKING:
    from specbatch.weights import Weights

__all__ = [
    "PLAIN",
    "Attention",
    "Experts",
    "Logits",
    "TargetShape",
    "attention",
    "bias_name",
    "brings_code",
    "embedding",
    "embedding_name",
    "fingerprint",
    "head_bias",
    "head_name",
    "latent_width",
    "lm_head",
    "locate",
    "read_target",
    "stored_head",
]

_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class TargetShape:
    """All facts about the target that the rest of specbatch uses."""

    path: Path
    """Directory of the target; for a hub name, the one in the hub's cache."""
    architecture: str
    """Class of the model: ``LlamaForCausalLM``."""
    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """``intermediate_size``: width of its MLP; in a mixture, of its dense layers, of one expert, or unused."""
    vocab: int
    """Rows of embedding and head, including padding."""
    max_positions: int
    """Longest context, with the target's own RoPE scaling."""
    rms_norm_eps: float
    rope: dict[str, Any]
    """``rope_theta``: float, and ``rope_scaling``: dict with ``rope_type``, or None; as the target was trained."""
    tied: bool
    """Whether the head is the embedding."""
    bos: int | None
    eos: tuple[int, ...]
    """All tokens that end a generation; the first one is that of config.json."""
    pad: int | None
    dtype: str
    """Dtype of the checkpoint's unquantised weights: ``bfloat16``, ``float16`` or ``float32``."""
    experts: Experts | None = None
    """The experts; None if all layers are dense."""
    latent: bool = False
    """Whether keys and values are computed from a latent (MLA), so that their heads cost no cache, unlike a draft's."""
    logits: Logits = PLAIN
    quantization: dict[str, Any] = field(default_factory=dict)
    """``quantization_config`` of config.json."""

    @cached_property
    def weights(self) -> Weights:
        """The tensors of the directory."""
        from specbatch.weights import Weights

        return Weights(self.path)


def read_target(path: str | Path) -> TargetShape:
    """Read a Hugging Face directory, or a hub name from this machine's cache.

    Raises:
        UserError: it does not exist, lacks something that is needed, or computes logits in a way that training does not
            support.
    """
    folder = locate(path)
    file = folder / "config.json"
    top = read_json(file)
    if top is None:
        raise UserError(f"target.path: {folder} has no config.json: not a Hugging Face model directory")
    text = language_config(file, top)

    def need(*keys: str) -> int:
        for key in keys:
            if isinstance(text.get(key), int):
                return text[key]
        raise UserError(f"{file}: no {keys[0]}; specbatch needs it to shape the draft")

    hidden, heads = need("hidden_size", "n_embd"), need("num_attention_heads", "n_head")
    layers, vocab = need("num_hidden_layers", "n_layer"), need("vocab_size")
    latent = bool(text.get("kv_lora_rank"))
    # With a latent, only a part of each key is rotated, and transformers calls the width of that part `head_dim`.
    head_dim = (text.get("v_head_dim") if latent else None) or text.get("head_dim") or hidden // heads
    rope = rope_of(file, text, head_dim)
    written = (language_part(top), top, read_json(folder / "generation_config.json") or {})

    def token_ids(key: str) -> tuple[int, ...]:
        # The class's defaults, which are those of its first model, count only if no file has a value.
        return _token_ids(written, key) or _token_ids((text,), key)

    architectures = top.get("architectures") or text.get("architectures") or [""]
    return TargetShape(
        path=folder,
        architecture=architectures[0],
        model_type=text.get("model_type", top.get("model_type", "")),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        intermediate=text.get("intermediate_size") or text.get("ffn_hidden_size") or 4 * hidden,
        vocab=vocab,
        max_positions=max_positions(file, text, rope),
        rms_norm_eps=float(text.get("rms_norm_eps") or text.get("layer_norm_eps") or 1e-6),
        rope=rope,
        tied=_tied(top, text),
        bos=_first(token_ids("bos_token_id")),
        eos=token_ids("eos_token_id"),
        pad=_first(token_ids("pad_token_id")),
        dtype=_dtype(folder, top, text),
        experts=experts_of(text),
        latent=latent,
        logits=logits_of(file, text),
        quantization=dict(top.get("quantization_config") or language_part(top).get("quantization_config") or {}),
    )


def locate(path: str | Path) -> Path:
    """Return the directory of a target.

    Raises:
        UserError: there is no such directory, and no such model in the hub's cache.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    name = str(path)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"target.path: there is no directory {path}")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"target.path: {name} is not a directory, and not in the cache {constants.HF_HUB_CACHE}; compute nodes are "
            f"often offline, so nothing is downloaded automatically: download it with `hf download {name}`, or give a "
            "directory"
        ) from error


def brings_code(shape: TargetShape) -> bool:
    """Return whether the directory contains Python code for its model or its tokenizer."""
    files = (read_json(shape.path / name) or {} for name in ("config.json", "tokenizer_config.json"))
    return any(content.get("auto_map") for content in files)


def attention(shape: TargetShape) -> tuple[AttentionLayers, ...]:
    """Return the attention of its layers, with the defaults of its class from transformers."""
    file = shape.path / "config.json"
    text = language_config(file, read_json(file) or {}, complete=True)
    return attention_of(text, layers=shape.layers, heads=shape.heads, head_dim=shape.head_dim)


def latent_width(shape: TargetShape) -> int:
    """Return the number of values of a token's latent and rotated key in a layer; 0 if keys and values are cached."""
    if not shape.latent:
        return 0
    text = language_part(read_json(shape.path / "config.json") or {})
    return int(text["kv_lora_rank"]) + int(text.get("qk_rope_head_dim") or 0)


def fingerprint(shape: TargetShape) -> str:
    """Return 16 hexadecimal digits that identify this target, from its config.json and its weights."""
    config = (shape.path / "config.json").read_bytes()
    return hashlib.sha256(config + shape.weights.fingerprint().encode()).hexdigest()[:16]


def _tied(top: dict[str, Any], text: dict[str, Any]) -> bool:
    for config in (top, text):
        if isinstance(config.get("tie_word_embeddings"), bool):
            return config["tie_word_embeddings"]
    return False


def _token_ids(configs: Iterable[dict[str, Any]], key: str) -> tuple[int, ...]:
    found: list[Any] = []
    for config in configs:
        value = config.get(key)
        found += value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(i for i in found if isinstance(i, int)))


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None


def _dtype(folder: Path, top: dict[str, Any], text: dict[str, Any]) -> str:
    for config in (text, top):
        named = config.get("dtype") or config.get("torch_dtype")
        if isinstance(named, str) and named.removeprefix("torch.") in _DTYPES:
            return named.removeprefix("torch.")
    from specbatch.weights import Weights

    return head_dtype(Weights(folder)) or "float32"
