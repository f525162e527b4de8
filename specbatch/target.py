"""The target model as its directory describes it: shape, RoPE, special tokens, embedding and head.

`read_target` fails for a target that specbatch would train a wrong draft for, before anything starts: the
loss would look plausible. Nothing here imports torch or transformers until a tensor is asked for.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbatch.capture import CaptureContract, default_aux_layers
from specbatch.config import Config
from specbatch.errors import UserError
from specbatch.weights import Weights

if TYPE_CHECKING:
    import torch

_CONTEXT_KEYS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
"""In SGLang's order."""
_CHANGED_LOGITS = {
    "final_logit_softcapping": None,
    "logits_scaling": 1,
    "logit_scale": 1,
    "lm_head_multiplier": 1,
    "output_multiplier_scale": 1,
    "dim_model_base": None,
}
"""Keys of models that do something between head and softmax, and the value with which they do nothing."""
_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "tok_embeddings.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class TargetShape:
    """What the rest of specbatch knows of the target."""

    path: Path
    """Its directory: of the hub's cache, where a hub name was given."""
    architecture: str
    """Class of the model: ``LlamaForCausalLM``."""
    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    """Rows of embedding and head, padding included."""
    max_positions: int
    """Longest context, with the target's own RoPE scaling."""
    rms_norm_eps: float
    rope: dict[str, Any]
    """``rope_theta``: float, and ``rope_scaling``: dict with ``rope_type``, or None; as the target was trained."""
    tied: bool
    """The head is the embedding."""
    bos: int | None
    eos: tuple[int, ...]
    """All tokens that end a generation; the first is config.json's."""
    pad: int | None
    dtype: str
    """Of the checkpoint: ``bfloat16``, ``float16`` or ``float32``."""

    @cached_property
    def weights(self) -> Weights:
        """The directory's tensors."""
        return Weights(self.path)


def read_target(path: str | Path) -> TargetShape:
    """Read a Hugging Face directory, or a hub name from this machine's cache.

    Raises:
        UserError: if it is not there, lacks what is needed, or computes logits in a way that training doesn't know.
    """
    folder = locate(path)
    top = _read_json(folder / "config.json")
    if top is None:
        raise UserError(f"target.path: {folder} has no config.json: not a Hugging Face model directory")
    text = _text_config(top)
    _refuse_changed_logits(folder, text)

    def need(*keys: str) -> int:
        for key in keys:
            if isinstance(text.get(key), int):
                return text[key]
        raise UserError(f"{folder / 'config.json'}: no {keys[0]}; specbatch needs it to shape the draft")

    hidden, heads = need("hidden_size", "n_embd"), need("num_attention_heads", "n_head")
    rope = _rope(text)
    generation = _read_json(folder / "generation_config.json") or {}
    architectures = top.get("architectures") or text.get("architectures") or [""]
    return TargetShape(
        path=folder,
        architecture=architectures[0],
        model_type=text.get("model_type", top.get("model_type", "")),
        hidden=hidden,
        layers=need("num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text.get("v_head_dim") or hidden // heads,
        intermediate=text.get("intermediate_size") or 4 * hidden,
        vocab=need("vocab_size"),
        max_positions=_max_positions(text, rope),
        rms_norm_eps=float(text.get("rms_norm_eps") or text.get("layer_norm_eps") or 1e-6),
        rope=rope,
        tied=_tied(top, text),
        bos=_first(_token_ids(top, text, generation, "bos_token_id")),
        eos=_token_ids(top, text, generation, "eos_token_id"),
        pad=_first(_token_ids(top, text, generation, "pad_token_id")),
        dtype=_dtype(top, text),
    )


def locate(path: str | Path) -> Path:
    """The directory of a target.

    Raises:
        UserError: if there is no such directory, and no such model in the hub's cache.
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
            f"target.path: {name} is no directory, and not in the cache {constants.HF_HUB_CACHE}; compute nodes are "
            f"often offline, so nothing is downloaded by itself: download it with `hf download {name}`, or give a "
            "directory"
        ) from error


def embedding(shape: TargetShape) -> torch.Tensor:
    """The token embedding, ``[vocab, hidden]``, in the stored dtype, on the CPU.

    Raises:
        UserError: if it is missing or of another shape.
    """
    return _load_matrix(shape, embedding_name(shape))


def lm_head(shape: TargetShape) -> torch.Tensor:
    """The head, ``[vocab, hidden]``, in the stored dtype, on the CPU; the embedding where the two are tied.

    Raises:
        UserError: if it is missing or of another shape.
    """
    return _load_matrix(shape, head_name(shape))


def embedding_name(shape: TargetShape) -> str:
    """Name of the embedding's tensor.

    Raises:
        UserError: if it can't be told.
    """
    rows = (shape.vocab, shape.hidden)
    tensors = shape.weights.tensors
    named = [name for name in tensors if name.split(".", 1)[-1].endswith(_EMBEDDINGS) or name in _EMBEDDINGS]
    fitting = [name for name in named if tensors[name].shape == rows]
    if len(fitting) == 1:
        return fitting[0]
    if not named:
        raise UserError(f"{shape.path}: no tensor embed_tokens.weight in {_files(shape)}; specbatch needs it")
    found = ", ".join(f"{name} {list(tensors[name].shape)}" for name in fitting or named)
    raise UserError(f"{shape.path}: which tensor is the embedding, {list(rows)} by config.json? Found {found}")


def head_name(shape: TargetShape) -> str:
    """Name of the tensor that serves as the head: the embedding's where the two are tied.

    Raises:
        UserError: for an untied target without a head.
    """
    if shape.tied:
        return embedding_name(shape)
    stored = stored_head(shape)
    if stored is None:
        raise UserError(
            f"{shape.path}: config.json says tie_word_embeddings: false, but there is no tensor {_HEAD} in "
            f"{_files(shape)}; if the target's head is its embedding, set tie_word_embeddings: true there, else "
            "download the missing file"
        )
    bias = stored.removesuffix("weight") + "bias"
    if bias in shape.weights.tensors:
        raise UserError(
            f"target.path: {shape.path} adds {bias} to its logits, which the loss does not know: such targets can't "
            "be used yet"
        )
    return stored


def stored_head(shape: TargetShape) -> str | None:
    """Name of the head's tensor in the files, also where a tied target does not use it."""
    names = [name for name in shape.weights.tensors if name == _HEAD or name.endswith(f".{_HEAD}")]
    return min(names, key=len, default=None)


def brings_code(shape: TargetShape) -> bool:
    """Whether the directory holds Python code for its model or its tokenizer."""
    files = (_read_json(shape.path / name) or {} for name in ("config.json", "tokenizer_config.json"))
    return any(content.get("auto_map") for content in files)


def aux_layers(config: Config, shape: TargetShape) -> tuple[int, ...]:
    """Layers whose outputs the draft reads: as configured, else a low, a middle and a high one.

    Raises:
        UserError: if the target is too shallow.
    """
    if config.draft.aux_layers is not None:
        return tuple(config.draft.aux_layers)
    try:
        return default_aux_layers(shape.layers)
    except ValueError as error:
        raise UserError(
            f"draft.aux_layers: {config.draft.algorithm} reads three distinct layers below the last one, and the "
            f"target {shape.path} has only {shape.layers} layers; it takes a target of at least 4"
        ) from error


def capture_contract(config: Config, shape: TargetShape) -> CaptureContract:
    """What is captured of this target for this draft."""
    return CaptureContract(aux_layers(config, shape), shape.hidden)


def language_config(shape: TargetShape) -> dict[str, Any]:
    """The part of config.json that describes the language model."""
    return _text_config(_read_json(shape.path / "config.json") or {})


def fingerprint(shape: TargetShape) -> str:
    """16 hexadecimal digits that tell this target from another: its config.json and its weights."""
    config = (shape.path / "config.json").read_bytes()
    return hashlib.sha256(config + shape.weights.fingerprint().encode()).hexdigest()[:16]


def _load_matrix(shape: TargetShape, name: str) -> torch.Tensor:
    stored = shape.weights.tensors[name]
    if stored.shape != (shape.vocab, shape.hidden):
        raise UserError(
            f"{stored.file}: {name} is {list(stored.shape)}, config.json says {[shape.vocab, shape.hidden]}"
        )
    if stored.dtype not in ("BF16", "F16", "F32"):
        raise UserError(f"{stored.file}: {name} is stored as {stored.dtype}; the loss needs it as BF16, F16 or F32")
    return shape.weights.load(name)


def _files(shape: TargetShape) -> str:
    names = sorted(shape.weights.files)
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def _text_config(top: dict[str, Any]) -> dict[str, Any]:
    """The part that describes the language model, in SGLang's order for models of several kinds of input."""
    for key in ("thinker_config", "llm_config", "language_config", "text_config"):
        if isinstance(top.get(key), dict):
            return _text_config(top[key])
    return top


def _refuse_changed_logits(folder: Path, text: dict[str, Any]) -> None:
    for key, harmless in _CHANGED_LOGITS.items():
        if text.get(key) not in (None, harmless):
            raise UserError(
                f"target.path: {folder} changes its logits after the head ({key}: {text[key]}), which the loss does "
                "not know: such targets can't be used yet"
            )


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """RoPE from either schema: ``rope_parameters`` of transformers 5, or ``rope_theta`` and ``rope_scaling``."""
    parameters = text.get("rope_parameters") or {}
    if parameters and all(isinstance(value, dict) for value in parameters.values()):
        # One block for each kind of layer: the draft attends to everything.
        parameters = parameters.get("full_attention") or next(iter(parameters.values()))
    block = dict(parameters or text.get("rope_scaling") or {})
    theta = block.pop("rope_theta", None) or text.get("rope_theta") or 10000.0
    kind = block.pop("rope_type", None) or block.pop("type", None) or "default"
    block.pop("type", None)
    block.pop("partial_rotary_factor", None)
    # Multimodal RoPE gives text positions the same angles as plain RoPE.
    scaling = None if kind in ("default", "mrope") else {"rope_type": kind, **block}
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def _max_positions(text: dict[str, Any], rope: dict[str, Any]) -> int:
    """SGLang's rule: a scaling factor counts unless the configuration says that it is counted already."""
    scaling = rope["rope_scaling"] or {}
    counted = "original_max_position_embeddings" in scaling or scaling.get("rope_type") == "llama3"
    for key in _CONTEXT_KEYS:
        if text.get(key) is not None:
            return int(text[key] * (1 if counted else scaling.get("factor") or 1))
    return 2048


def _tied(top: dict[str, Any], text: dict[str, Any]) -> bool:
    for config in (top, text):
        if isinstance(config.get("tie_word_embeddings"), bool):
            return config["tie_word_embeddings"]
    # Left out of config.json where it is the default of the model's class, which only transformers knows.
    from transformers import CONFIG_MAPPING

    kind = text.get("model_type")
    return kind in CONFIG_MAPPING and bool(getattr(CONFIG_MAPPING[kind](), "tie_word_embeddings", False))


def _token_ids(top: dict[str, Any], text: dict[str, Any], generation: dict[str, Any], key: str) -> tuple[int, ...]:
    found: list[Any] = []
    for config in (text, top, generation):
        value = config.get(key)
        found += value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(i for i in found if isinstance(i, int)))


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None


def _dtype(top: dict[str, Any], text: dict[str, Any]) -> str:
    for config in (text, top):
        named = config.get("dtype") or config.get("torch_dtype")
        if isinstance(named, str):
            return named.removeprefix("torch.")
    return "float32"
