"""SGLang's arguments: those of the installed SGLang, and those that a configuration may not set.

SGLang's names are read from its source, not by importing it: that would take seconds and load torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbatch.errors import UserError
from specbatch.inference import text_only
from specbatch.inference.accelerator import accelerator_bytes, cpu_multiplies_bfloat16
from specbatch.inference.pace import LEAST_IN_FLIGHT
from specbatch.units import bytes_text

if TYPE_CHECKING:
    from specbatch.config import Config
    from specbatch.target import TargetShape

RESERVED_TOKENS = 6
"""Positions of its context that SGLang reserves for itself."""
GPU_RESERVE_BYTES = 5 << 30
"""GPU memory reserved for CUDA, NCCL and the workspaces of kernels."""
LEAST_FRACTION = 0.3
"""`memory_fraction` below which an engine is not started."""

_SPECULATION = "the engine captures hidden states without a draft, and `evaluate` sets speculation itself"
_EVERY_ROW = "every token must pass through the target, none may come from a cache: remove it"
_CHOSEN = "specbatch chooses it, so that two engines may share a machine: remove it"
_NODES = "set inference.nodes_per_engine instead"
_LOOPBACK = "the engine listens to its own specbatch process only, over plain HTTP: remove it"

BREAKS_CAPTURE: dict[str, str] = {
    # Set from other sections.
    "model_path": "set target.path instead",
    "tokenizer_path": "the tokenizer is the target's: set target.path instead",
    "revision": "give the directory of that revision as target.path instead",
    "dtype": "set target.dtype instead",
    "trust_remote_code": "set target.trust_remote_code instead",
    "json_model_override_args": "the draft would be made for another target: edit the target's config.json instead",
    "tp_size": "set inference.tensor_parallel instead",
    "tensor_parallel_size": "set inference.tensor_parallel instead",
    "tp": "set inference.tensor_parallel instead",
    "dp_size": "set inference.engines instead",
    "data_parallel_size": "set inference.engines instead",
    "dp": "set inference.engines instead",
    # Capture depends on these.
    "skip_tokenizer_init": "the engine is sent token ids, and specbatch sets it: remove it",
    "disable_radix_cache": "specbatch sets it, since every token must pass through the target: remove it",
    "enable_return_aux_hidden_states": "specbatch sets it: remove it",
    "return_aux_hidden_state_layer_ids": "set draft.aux_layers instead",
    "aux_hidden_state_capture": "specbatch sets it through the draft's algorithm: remove it",
    "enable_return_hidden_states": "hidden states go to the store, not into answers: remove it",
    "return_hidden_states_mode": "hidden states go to the store, not into answers: remove it",
    "enable_hierarchical_cache": _EVERY_ROW,
    "enable_session_radix_cache": _EVERY_ROW,
    "enable_streaming_session": _EVERY_ROW,
    "radix_cache_backend": _EVERY_ROW,
    "enable_unified_cache_external_linker": _EVERY_ROW,
    "enable_lmcache": _EVERY_ROW,
    "enable_flexkv": _EVERY_ROW,
    "allow_auto_truncate": "a truncated sample would lack rows; see data.max_tokens: remove it",
    "is_embedding": "an embedding model has no next token to propose: remove it",
    "dllm_algorithm": "a diffusion model has no next token to propose: remove it",
    "disaggregation_mode": "each engine does both prefill and decoding: remove it",
    "encoder_only": "an engine runs the whole language model: remove it",
    "enable_pdmux": "prefill takes another path through the scheduler, which is not captured: remove it",
    "pp_size": "only the last pipeline rank would see its layers; set inference.tensor_parallel instead",
    "pipeline_parallel_size": "only the last pipeline rank would see its layers; set inference.tensor_parallel instead",
    "enable_multi_layer_eagle": _SPECULATION,
    # Processes, ports, devices.
    "host": _CHOSEN,
    "port": _CHOSEN,
    "nccl_port": _CHOSEN,
    "grpc_port": _CHOSEN,
    "base_gpu_id": "specbatch gives each engine GPUs of its own: remove it",
    "gpu_id_step": "specbatch gives each engine GPUs of its own: remove it",
    "nnodes": _NODES,
    "node_rank": _NODES,
    "dist_init_addr": _NODES,
    "use_ray": _NODES,
    "grpc_mode": _LOOPBACK,
    "smg_grpc_mode": _LOOPBACK,
    "api_key": _LOOPBACK,
    "admin_api_key": _LOOPBACK,
    "ssl_keyfile": _LOOPBACK,
    "ssl_certfile": _LOOPBACK,
    "fastapi_root_path": _LOOPBACK,
}
"""Arguments that ``inference.sglang`` may not contain, and what to do instead."""

_OWN_REQUESTS = "each group of ranks would compute its own requests, but rank 0, which stores, lacks those of others"
_PART_OF_ROWS = (
    "each rank would hold a part of a prefill's rows between layers, but rank 0, which stores, lacks those of others"
)
SHARES_ROWS: dict[str, str] = {
    "enable_dp_attention": _OWN_REQUESTS,
    "attn_dp_size": _OWN_REQUESTS,
    "attn_cp_size": _PART_OF_ROWS,
    "enable_prefill_cp": _PART_OF_ROWS,
    "enable_attn_tp_input_scattered": _PART_OF_ROWS,
    "enable_layernorm_sp": _PART_OF_ROWS,
    "moe_a2a_backend": f"{_PART_OF_ROWS}; ep_size alone keeps all rows on all ranks",
}
"""The same, except for their neutral value. Expert parallelism alone (``ep_size``) and keys and values that
are shared among ranks (``dcp_size``) leave every rank with all rows."""
_NEUTRAL = ("None", "False", "1", "none")

BREAKS_DETERMINISM: dict[str, str] = {
    "chunked_prefill_size": "where a prompt is cut would depend on its neighbours: remove it, or set "
    "inference.deterministic: false",
    "enable_dynamic_chunking": "where a prompt is cut would depend on its neighbours: remove it, or set "
    "inference.deterministic: false",
    "enable_mixed_chunk": "what is computed together would depend on its neighbours: remove it, or set "
    "inference.deterministic: false",
}
"""The same if ``inference.deterministic`` is set."""


def refusal(name: str, value: Any, deterministic: bool) -> str | None:
    """Return why ``inference.sglang`` may not contain an argument, and what to do; None if it may."""
    if name.startswith("speculative_"):
        return f"{_SPECULATION}: remove it"
    if name in SHARES_ROWS and str(value) not in _NEUTRAL:
        return f"{SHARES_ROWS[name]}: remove it"
    return BREAKS_CAPTURE.get(name) or (BREAKS_DETERMINISM.get(name) if deterministic else None)


def refuse_unknown(names: Iterable[str], key: str) -> None:
    """Raise UserError for the first name that is not an argument of the installed SGLang, with the nearest argument.

    Args:
        key: the field with the names, for the message: ``inference.sglang``.
    """
    known = sglang_argument_names()
    for name in names if known else ():
        if name in known:
            continue
        near = difflib.get_close_matches(name.replace("-", "_"), {*known, *BREAKS_CAPTURE}, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "see `python -m sglang.launch_server --help`"
        if near and near[0] in BREAKS_CAPTURE:
            hint = f"if you mean {near[0]}: {BREAKS_CAPTURE[near[0]]}"
        raise UserError(f"{key}.{name}: SGLang {importlib.metadata.version('sglang')} has no such argument; {hint}")


@lru_cache(maxsize=1)
def sglang_argument_names() -> frozenset[str]:
    """Return the arguments of the installed SGLang, by the names of ``ServerArgs``; empty if SGLang is missing."""
    found = importlib.util.find_spec("sglang")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    srt = Path(next(iter(found.submodule_search_locations))) / "srt"
    # Newer releases divide the fields into classes by subject; older ones have them in ServerArgs.
    sources = [*sorted((srt / "arg_groups" / "fields").glob("*.py")), srt / "server_args.py"]
    names: set[str] = set()
    for source in sources:
        if not source.is_file():
            continue
        grouped = source.parent.name == "fields"
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and (grouped or node.name == "ServerArgs"):
                names.update(
                    item.target.id
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                )
    return frozenset(name for name in names if not name.startswith("_"))


def engine_arguments(config: Config, target: TargetShape, gpu_bytes: int | None = None) -> dict[str, Any]:
    """Return the arguments of a capturing engine, by SGLang's names; ``inference.sglang`` takes precedence.

    Args:
        gpu_bytes: memory of each of its GPUs. Default: this machine's.

    Raises:
        UserError: the GPU has too little memory for an unchunked prefill.
    """
    elsewhere = gpu_bytes is not None
    gpu_bytes = accelerator_bytes() if gpu_bytes is None else gpu_bytes
    arguments: dict[str, Any] = {
        "model_path": str(target.path),
        "dtype": config.target.dtype if elsewhere else engine_dtype(config),
        "trust_remote_code": config.target.trust_remote_code,
        "tp_size": config.inference.tensor_parallel,
        # Engines do not decode.
        "disable_decode_cuda_graph": True,
    }
    if config.inference.deterministic:
        # Where a prefill is cut, and so its last bits, would depend on the others in its batch.
        arguments["chunked_prefill_size"] = -1
        # Limits a batch; a longer sample would have to be cut.
        arguments["max_prefill_tokens"] = batch_tokens(config)
        if gpu_bytes:
            arguments["enable_deterministic_inference"] = True
            arguments["mem_fraction_static"] = memory_fraction(config, target, gpu_bytes)
    if _longer_than_target(config, target):
        arguments["context_length"] = _longest(config) + RESERVED_TOKENS
    if not gpu_bytes:
        packs = config.inference.packs_in_flight or LEAST_IN_FLIGHT
        arguments["max_total_tokens"] = max(4096, packs * config.training.tokens_per_pack + 1024)
    return arguments | config.inference.sglang


def engine_dtype(config: Config) -> str:
    """Return the dtype of a run's engine on this machine, as SGLang names it."""
    if config.target.dtype != "auto" or accelerator_bytes() or cpu_multiplies_bfloat16():
        return config.target.dtype
    return "float32"


def engine_environment(config: Config, target: TargetShape) -> dict[str, str]:
    """Return the environment variables for `engine_arguments`."""
    # DeepGEMM would compile each number of rows up to 65,536 before the first prefill; it compiles the others when they
    # come.
    environment = {"SGLANG_JIT_DEEPGEMM_FAST_WARMUP": "1"}
    if config.data.images:
        environment[text_only.SELECT] = "0"
    if _longer_than_target(config, target):
        environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    return environment


def batch_tokens(config: Config) -> int:
    """Return the most tokens of a prefill that is not cut."""
    return max(8192, config.data.max_tokens)


def memory_fraction(config: Config, target: TargetShape, gpu_bytes: int) -> float:
    """Return the share of a GPU's memory for weights, keys and values; the rest is for activations.

    SGLang's own rule reserves 1.5 MB per token, several times more than a prefill of an 8B target needs, and leaves
    nothing for the weights if ``max_prefill_tokens`` is large.

    Raises:
        UserError: too little would be left.
    """
    tokens = batch_tokens(config)
    needed = GPU_RESERVE_BYTES + tokens * activation_bytes(target, config.inference.tensor_parallel)
    fraction = min(0.9, 1 - needed / gpu_bytes)
    if fraction < LEAST_FRACTION:
        raise UserError(
            f"inference.deterministic: true: a prefill of {tokens} tokens that may not be cut needs about "
            f"{bytes_text(needed)} of a GPU's {bytes_text(gpu_bytes)}, which leaves too little for the target; set "
            f"inference.deterministic: false, a smaller data.max_tokens than {config.data.max_tokens}, or a larger "
            "inference.tensor_parallel"
        )
    return round(fraction, 3)


def activation_bytes(target: TargetShape, ranks: int) -> int:
    """Return the bytes of activations that a token of a prefill needs on one of an engine's GPUs.

    Counted with 2 bytes per value: the residual stream, its normed copy, the results of attention and MLP and the
    captured and copied states, about 12 times the hidden size; for the rank's share of heads and MLP, queries, keys,
    values and attention's result, and gate, up and their product, twice to allow for the kernels' workspaces. For an 8B
    target on one GPU this is 0.3 MB.
    """
    attention = 2 * (target.heads + target.kv_heads) * target.head_dim
    return 2 * (12 * target.hidden + 2 * (attention + 3 * target.intermediate) // ranks)


def start_timeout_s(config: Config, target: TargetShape) -> float:
    """Return the seconds that an engine may take to start."""
    given = config.inference.start_timeout_s
    return given or 900.0 + target.weights.total_bytes / (256 << 20)


def most_tokens(config: Config, target: TargetShape) -> int:
    """Return the tokens of the longest request that the engine accepts."""
    needed = _longest(config) + RESERVED_TOKENS
    context = config.inference.sglang.get("context_length") or max(target.max_positions, needed)
    return int(context) - RESERVED_TOKENS


def _longest(config: Config) -> int:
    """Return the tokens of the longest request: without a sample's last token, which is never captured, unless samples
    have images and are sent whole."""
    return config.data.max_tokens - (0 if config.data.images else 1)


def _longer_than_target(config: Config, target: TargetShape) -> bool:
    """Return whether samples fill the target's context so far that SGLang's reserve has to be beyond it."""
    return _longest(config) + RESERVED_TOKENS > target.max_positions
