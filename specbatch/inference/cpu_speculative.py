"""Speculative decoding by unmodified SGLang on a machine without an accelerator, through SGLang's own hooks.

SGLang drafts with EAGLE-3 and DFlash on GPUs only. `register`, an entry point of the group ``sglang.srt.plugins``, puts
the plain PyTorch forms of `specbatch.inference.chain_drafting` and `specbatch.inference.block_drafting` in place of the
kernels if the environment has ``SPECBATCH_CPU_SPECULATIVE=1`` and there is no accelerator. It serves greedy
decoding with a chain of drafts (EAGLE-3 with ``speculative_eagle_topk`` 1) or a block of them (DFlash), and refuses
everything else by name: arguments before the engine starts, sampling parameters as each request arrives. If SGLang's
code differs at one of these places from the tested versions, the process ends with a message that names the place.
"""

from __future__ import annotations

import inspect
import os
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from specbatch.drafts.sglang import CPU_ALGORITHMS

SELECT = "SPECBATCH_CPU_SPECULATIVE"
"""Environment variable that turns the plugin on if it is ``1``."""

BACKEND = "torch_native"
"""SGLang's attention in plain PyTorch."""

_OPS = "sglang.kernels.ops"
_ARGUMENTS = "sglang.srt.arg_groups.speculative_hook.handle_speculative_decoding"
_SAMPLING = "sglang.srt.sampling.sampling_params.SamplingParams.verify"
_FACTORY = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
_BLOCK_MODEL = "sglang.srt.models.dflash.DFlashDraftModel"
_ATTENTION = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"

GREEDY_ONLY = {
    "top_p": 1.0,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "beam_width": None,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "logit_bias": None,
    "watermark": None,
}
"""Sampling parameters that must have these values, with which they have no effect."""


class Hook(NamedTuple):
    """One place in SGLang and its replacement."""

    target: str
    function: Callable[..., Any]
    around: bool
    """Whether the function wraps the original, which is its first argument, instead of replacing it."""


def selected() -> bool:
    """Whether the environment asks for the plugin."""
    return os.environ.get(SELECT) == "1"


def register() -> None:
    """Entry point: install the hooks, or do nothing if the plugin is not enabled.

    Raises:
        SystemExit: SGLang is not as expected. SGLang logs other exceptions of a plugin and continues without it.
    """
    if not selected():
        return
    try:
        import torch

        if torch.accelerator.is_available():
            return
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        hooks = _hooks()
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"specbatch: {SELECT}: this SGLang cannot be hooked: {error!r}") from error
    problems = [problem for hook in hooks if (problem := mismatch(hook))]
    if problems:
        raise SystemExit(f"specbatch: {SELECT}: SGLang is not the one that was hooked: {'; '.join(problems)}")
    # SGLang uses this list, besides the platform, for the attention backends that a draft may have.
    from sglang.srt.arg_groups.choices import add_draft_attention_backend_choices

    add_draft_attention_backend_choices([BACKEND])
    # SGLang's worker of blocks keeps memory from being used again before a stream is done. A CPU has no streams, and
    # torch refuses the call.
    torch.Tensor.record_stream = lambda self, s: None  # type: ignore[method-assign]
    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, HookType.AROUND if hook.around else HookType.REPLACE)


def mismatch(hook: Hook) -> str | None:
    """Say why a hook does not fit its place: it is missing, or its parameters are others; None if it fits."""
    try:
        original = pkgutil.resolve_name(hook.target)
    except (ImportError, AttributeError) as error:
        return f"{hook.target} is missing ({error})"
    expected = list(inspect.signature(hook.function).parameters)[hook.around :]
    found = list(inspect.signature(original).parameters)
    return None if found == expected else f"{hook.target} takes {', '.join(found)}, not {', '.join(expected)}"


def _hooks() -> list[Hook]:
    """All hooks. Each function's docstring says what it replaces."""
    from specbatch.inference import block_drafting as block
    from specbatch.inference import chain_drafting as chain

    return [
        Hook(_ARGUMENTS, refuse_arguments, around=True),
        Hook(_SAMPLING, refuse_sampling, around=True),
        Hook(f"{_OPS}.kvcache.cache_move.copy_all_layer_kv_cache_func", chain.copy_slots, around=False),
        Hook("sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func", chain.assign_request_slots, around=False),
        Hook(
            f"{_OPS}.speculative.cache_locs.assign_draft_cache_locs_contiguous_func",
            chain.assign_draft_slots,
            around=False,
        ),
        Hook(f"{_OPS}.speculative.spec_tree.build_tree_kernel_efficient_func", chain.build_chain, around=False),
        Hook(f"{_OPS}.speculative.spec_tree.verify_tree_greedy_func", chain.verify_chain, around=False),
        Hook(f"{_OPS}.speculative.eagle.fill_bonus_tokens_func", chain.last_accepted, around=False),
        Hook(f"{_ATTENTION}._run_sdpa_forward_extend", chain.attend_chain, around=True),
        Hook(f"{_FACTORY}.create_decode_backend", create_chain_attention, around=True),
        Hook(f"{_FACTORY}.create_draft_extend_backend", chain.create_extend_attention, around=True),
        Hook(f"{_BLOCK_MODEL}.forward", block.forward_block, around=True),
    ]


def create_chain_attention(original: Callable[..., Any], self: Any) -> Any:
    """Call `chain_drafting.create_chain_attention` after checking that all hooks were applied.

    It runs in the decoding process after hooks are applied: the last moment to stop.

    Raises:
        RuntimeError: which ends the engine before it serves anything.
    """
    from specbatch.inference import chain_drafting as chain

    require_hooks()
    return chain.create_chain_attention(original, self)


def require_hooks() -> None:
    """Check that all hooks were applied.

    Raises:
        RuntimeError: one was not.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [hook.target for hook in _hooks() if hook.target not in HookRegistry._patched]
    if missing:
        raise RuntimeError(f"specbatch: {SELECT}: hooks that were not applied: {', '.join(missing)}")


def refuse_arguments(original: Callable[..., None], server_args: Any) -> None:
    """Let SGLang resolve its arguments for speculation, then refuse what the hooks do not support.

    Raises:
        ValueError: which ends the server before it loads anything.
    """
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view

    original(server_args)
    view = resolved_view(server_args)
    if view.speculative_algorithm is None:
        return
    required = {
        "speculative_eagle_topk": 1,
        "speculative_use_rejection_sampling": False,
        "speculative_adaptive": False,
        "enable_multi_layer_eagle": False,
        "tp_size": 1,
        "pp_size": 1,
        "dp_size": 1,
    }
    refused = []
    if view.speculative_algorithm not in CPU_ALGORITHMS:
        refused = [f"speculative_algorithm {view.speculative_algorithm} (only {' and '.join(CPU_ALGORITHMS)})"]
    refused += [
        f"{name} {getattr(view, name)} (only {value})"
        for name, value in required.items()
        if getattr(view, name) != value
    ]
    backends = {*attention_backends_of(view), view.speculative_draft_attention_backend or BACKEND}
    refused += [f"attention backend {backend} (only {BACKEND})" for backend in sorted(backends - {BACKEND})]
    if refused:
        raise ValueError(f"speculative decoding on a CPU does not support {'; '.join(refused)}")


def refuse_sampling(original: Callable[..., None], self: Any, vocab_size: int) -> None:
    """Check a request's sampling parameters, then refuse those that are not plain greedy decoding.

    Raises:
        ValueError: SGLang returns it as the answer to the request, with HTTP 400.
    """
    original(self, vocab_size)
    # SGLang turns temperature 0 into top_k 1.
    refused = [] if self.top_k == 1 else [f"temperature {self.temperature:g} (only 0)"]
    refused += [
        f"{name} {getattr(self, name)}" for name, value in GREEDY_ONLY.items() if getattr(self, name) not in (value, {})
    ]
    if refused:
        raise ValueError(f"speculative decoding on a CPU is greedy: it does not support {', '.join(refused)}")
