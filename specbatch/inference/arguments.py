"""SGLang's arguments: which exist in the installed SGLang, and which a configuration may not set.

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
from specbatch.inference.accelerator import accelerator_available

if TYPE_CHECKING:
    from specbatch.config import Config
    from specbatch.target import TargetShape

RESERVED_TOKENS = 6
"""SGLang keeps so many positions of its context for itself."""

_SPECULATION = "the engine captures hidden states without a draft, and `evaluate` sets speculation itself"
_ONE_RANK_HAS_ALL_ROWS = "each tensor-parallel rank must hold all rows of a prefill: remove it"
_EVERY_ROW = "every token must pass through the target, none may come from a cache: remove it"
_CHOSEN = "specbatch chooses it, so that two engines may share a machine: remove it"
_ONE_NODE = "an engine lives on one node: remove it"
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
    # What capture rests on.
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
    "disaggregation_mode": "an engine prefills and answers by itself: remove it",
    "encoder_only": "an engine runs the whole language model: remove it",
    "enable_pdmux": "prefill takes another way through the scheduler, which is not captured: remove it",
    "pp_size": "only the last pipeline rank would see its layers; set inference.tensor_parallel instead",
    "pipeline_parallel_size": "only the last pipeline rank would see its layers; set inference.tensor_parallel instead",
    "enable_dp_attention": _ONE_RANK_HAS_ALL_ROWS,
    "attn_dp_size": _ONE_RANK_HAS_ALL_ROWS,
    "attn_cp_size": _ONE_RANK_HAS_ALL_ROWS,
    "enable_prefill_cp": _ONE_RANK_HAS_ALL_ROWS,
    "dcp_size": _ONE_RANK_HAS_ALL_ROWS,
    "enable_multi_layer_eagle": _SPECULATION,
    # Processes, ports, devices.
    "host": _CHOSEN,
    "port": _CHOSEN,
    "nccl_port": _CHOSEN,
    "grpc_port": _CHOSEN,
    "base_gpu_id": "specbatch gives each engine GPUs of its own: remove it",
    "gpu_id_step": "specbatch gives each engine GPUs of its own: remove it",
    "nnodes": _ONE_NODE,
    "node_rank": _ONE_NODE,
    "dist_init_addr": _ONE_NODE,
    "use_ray": _ONE_NODE,
    "grpc_mode": _LOOPBACK,
    "smg_grpc_mode": _LOOPBACK,
    "api_key": _LOOPBACK,
    "admin_api_key": _LOOPBACK,
    "ssl_keyfile": _LOOPBACK,
    "ssl_certfile": _LOOPBACK,
    "fastapi_root_path": _LOOPBACK,
}
"""Arguments that ``inference.sglang`` may not hold, and what to do instead."""

BREAKS_DETERMINISM: dict[str, str] = {
    "chunked_prefill_size": "where a prompt is cut would depend on its neighbours: remove it, or set "
    "inference.deterministic: false",
    "enable_dynamic_chunking": "where a prompt is cut would depend on its neighbours: remove it, or set "
    "inference.deterministic: false",
    "enable_mixed_chunk": "what is computed together would depend on the neighbours: remove it, or set "
    "inference.deterministic: false",
}
"""The same where ``inference.deterministic`` is set."""


def refusal(name: str, deterministic: bool) -> str | None:
    """Why ``inference.sglang`` may not hold an argument, and what to do; None if it may."""
    if name.startswith("speculative_"):
        return f"{_SPECULATION}: remove it"
    return BREAKS_CAPTURE.get(name) or (BREAKS_DETERMINISM.get(name) if deterministic else None)


def refuse_unknown(names: Iterable[str], key: str) -> None:
    """Raise UserError for the first name that is no argument of the installed SGLang, with the nearest that is.

    Args:
        key: where the names stand, for the message: ``inference.sglang``.
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
    """The arguments of the installed SGLang, by the names of ``ServerArgs``; empty where SGLang is missing."""
    found = importlib.util.find_spec("sglang")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    srt = Path(next(iter(found.submodule_search_locations))) / "srt"
    # The fields stand in classes by subject; older releases have them in ServerArgs itself.
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


def engine_arguments(config: Config, target: TargetShape) -> dict[str, Any]:
    """What a capturing engine of a run is started with, by SGLang's names; ``inference.sglang`` wins."""
    arguments: dict[str, Any] = {
        "model_path": str(target.path),
        "dtype": config.target.dtype,
        "trust_remote_code": config.target.trust_remote_code,
        "tp_size": config.inference.tensor_parallel,
    }
    if config.inference.deterministic:
        # Where a prefill is cut, and so its last bits, would depend on the others in its batch.
        arguments["chunked_prefill_size"] = -1
        # Of a batch; a sample that is longer would have to be cut.
        arguments["max_prefill_tokens"] = max(16384, config.data.max_tokens)
    if _longer_than_target(config, target):
        arguments["context_length"] = _longest(config) + RESERVED_TOKENS
    if not accelerator_available():
        arguments["max_total_tokens"] = max(
            4096, config.inference.packs_in_flight * config.training.tokens_per_pack + 1024
        )
    return arguments | config.inference.sglang


def engine_environment(config: Config, target: TargetShape) -> dict[str, str]:
    """Variables that go with `engine_arguments`."""
    return {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"} if _longer_than_target(config, target) else {}


def most_tokens(config: Config, target: TargetShape) -> int:
    """Tokens of the longest request that the engine takes."""
    context = int(engine_arguments(config, target).get("context_length") or target.max_positions)
    return context - RESERVED_TOKENS


def _longest(config: Config) -> int:
    """Of a sample's last token nothing is ever wanted."""
    return config.data.max_tokens - 1


def _longer_than_target(config: Config, target: TargetShape) -> bool:
    """Whether samples fill the target's context so far that SGLang's reserve has to lie beyond it."""
    return _longest(config) + RESERVED_TOKENS > target.max_positions
