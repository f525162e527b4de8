"""The capture plugin, which SGLang loads through its own entry point into each of its processes.

If the environment has `CaptureSettings` it either captures or ends SGLang: before anything is loaded, if the version of
SGLang is not the expected one; when the scheduler starts, if a hook did not apply or an argument would break the
capture; and in the first prefills, if SGLang's states are not what the contract names (`contract_probe`). Otherwise it
only repairs what SGLang computes wrongly or not at all: Gemma-3's and Mistral-3's classes, whose drafts would be served
other states than they learnt from (`gemma3`, `class_repairs`), and more on CPUs (`cpu_mla`, `cpu_sinks`,
`cpu_processes`). A server that is sent token ids does not load image processors (`text_only`).
"""

from __future__ import annotations

import inspect
import logging
import os
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbatch.inference import class_repairs, cpu_mla, cpu_processes, cpu_sinks, gemma3, text_only
from specbatch.inference.accelerator import CPU_PLATFORM, PLATFORM_VARIABLE
from specbatch.inference.capture_request import HOOKED, SETTINGS_VARIABLE, CaptureSettings

if TYPE_CHECKING:
    from specbatch.inference.contract_probe import Proof
    from specbatch.inference.prefill_capture import PrefillCapture

logger = logging.getLogger(__name__)

FORWARD = "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation"
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler.__init__"
EXPECTED: dict[str, tuple[str, ...]] = {
    FORWARD: ("self", "batch"),
    SCHEDULER: ("self", "server_args"),
    # Not hooked, but called or called back.
    "sglang.srt.managers.auxiliary_output.append_auxiliary_output": ("current", "output"),
    "sglang.srt.managers.auxiliary_output.DeviceAuxiliaryOutput.copy_to_host": ("self", "copy_tensor"),
    "sglang.srt.managers.auxiliary_output.HostAuxiliaryOutput.consume": ("self", "batch", "commits"),
    "sglang.srt.managers.utils.GenerationBatchResult.copy_auxiliary_output_to_cpu": ("self",),
    "sglang.srt.runtime_context.get_parallel": (),
}
"""Places in SGLang and the parameters that they must begin with."""
REQUIRED: dict[str, Any] = {
    "disable_radix_cache": True,
    "enable_return_aux_hidden_states": True,
    "enable_dp_attention": False,
    "pp_size": 1,
    "dp_size": 1,
    "disaggregation_mode": "null",
    "speculative_draft_model_path": None,
}
"""Arguments without which rows would be missing, or would not be those of a prefill."""

_capture: PrefillCapture | None = None
"""The capture of this process; set in the scheduler of tensor-parallel rank 0, as is ``_proof``."""
_proof: Proof | None = None
_layers: Sequence[int] = ()
"""Layers whose outputs are captured; set in each scheduler."""
_embeds = False
"""Whether embeddings are captured as well; set in each scheduler."""


def register() -> None:
    """Entry point of the group ``sglang.srt.plugins``.

    Raises:
        SystemExit: SGLang is not as expected. SGLang logs other exceptions of a plugin and continues without it.
    """
    if SETTINGS_VARIABLE in os.environ:
        _hook_capture()
    gemma3.register()
    class_repairs.register()
    cpu_mla.register()
    if os.environ.get(PLATFORM_VARIABLE) == CPU_PLATFORM:
        cpu_sinks.register()
        cpu_processes.register()
    text_only.register()


def _hook_capture() -> None:
    problems = [problem for target, names in EXPECTED.items() if (problem := mismatch(target, names))]
    if problems:
        raise SystemExit(f"specbatch: hidden states cannot be captured from this SGLang: {'; '.join(problems)}")
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(FORWARD, around_forward, HookType.AROUND)
    HookRegistry.register(SCHEDULER, after_scheduler_init, HookType.AFTER)


def mismatch(target: str, names: tuple[str, ...]) -> str | None:
    """Return why a place in SGLang is not as expected; None if it is."""
    try:
        found: Callable[..., Any] = pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        return f"{target} is missing ({error})"
    parameters = tuple(inspect.signature(found).parameters)
    return None if parameters[: len(names)] == names else f"{target} takes {parameters}, not {names}"


def after_scheduler_init(result: None, scheduler: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Check that all hooks were applied, then connect to the store.

    Raises:
        RuntimeError: which ends the engine before it serves anything.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.runtime_context import get_parallel

    problems = [f"{target} was not hooked" for target in (FORWARD, SCHEDULER) if target not in HookRegistry._patched]
    for name, wanted in REQUIRED.items():
        if getattr(server_args, name) != wanted:
            problems.append(f"{name} must be {wanted}, not {getattr(server_args, name)}")
    if os.environ.get("SGLANG_ENABLE_DELAY_SAMPLE", "0").lower() in ("1", "true"):
        problems.append("SGLANG_ENABLE_DELAY_SAMPLE must not be set")
    if problems:
        raise RuntimeError(f"specbatch: hidden states cannot be captured: {'; '.join(problems)}")
    import msgspec

    from specbatch.inference.contract_probe import Proof

    global _capture, _embeds, _layers, _proof
    settings = msgspec.json.decode(Path(os.environ[SETTINGS_VARIABLE]).read_bytes(), type=CaptureSettings)
    _layers, _embeds = settings.layers, () in settings.sources.values()
    if get_parallel().tp_rank == 0:
        _proof = Proof(_layers, type(scheduler.tp_worker.model_runner.model).__name__)
        _capture = open_capture(settings)


def open_capture(settings: CaptureSettings) -> PrefillCapture:
    """Connect to the attempt's store and register the memory that rows are sent from."""
    import torch

    from specbatch.config import Store
    from specbatch.dispatch.connection_file import wait_for
    from specbatch.inference.prefill_capture import PrefillCapture
    from specbatch.inference.sender import Sender
    from specbatch.transfer.store import StoreClient

    rendezvous = wait_for(Path(settings.rendezvous), settings.attempt, timeout_s=0.0)
    store = StoreClient(rendezvous, Store(protocol=settings.protocol, devices=settings.devices))
    memory = torch.empty(settings.buffer_bytes, dtype=torch.uint8, pin_memory=torch.accelerator.is_available())
    store.register(memory.data_ptr(), memory.numel())
    sender = Sender(settings, rendezvous.run, rendezvous.checksum_seed, store, memory)
    logger.info("specbatch captures hidden states buffer_bytes=%d widths=%s", memory.numel(), settings.widths)
    return PrefillCapture(settings.widths, settings.sources, sender)


def around_forward(original: Callable[..., Any], worker: Any, batch: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Attach the captured rows of a prefill to its result, as one of SGLang's auxiliary outputs; verify those of a
    probe."""
    if not _layers or batch is None or not batch.forward_mode.is_extend():
        return original(worker, batch, *args, **kwargs)
    from sglang.srt.managers.auxiliary_output import append_auxiliary_output

    from specbatch.inference.contract_probe import LayerRecorder, probe_of, without_graphs

    probe, problem = probe_of(batch), None
    if probe is not None and probe[0] == HOOKED:
        runner = worker.model_runner
        # On all ranks, since all have to compute in the same way.
        watch = LayerRecorder(runner.model, runner.model_config.num_hidden_layers)
        with without_graphs(runner), watch:
            result = original(worker, batch, *args, **kwargs)
        if _proof is not None:
            problem = _proof.hooked(watch, result.logits_output, probe[1])
    else:
        result = original(worker, batch, *args, **kwargs)
        if _proof is not None and probe is not None:
            problem = _proof.plain(result.logits_output, probe[1])
    embeds = _embeddings(worker.model_runner.model, batch, result.logits_output) if _embeds else None
    if _capture is not None:
        output = result.logits_output
        rows = _capture.gather(batch, output, problem, embeds)
        if rows is not None:
            output.auxiliary_device_output = append_auxiliary_output(output.auxiliary_device_output, rows)
    return result


def _embeddings(model: Any, batch: Any, output: Any) -> Any:
    """Return the embeddings that the first layer read in a prefill, ``[rows, hidden]``, as a draft is given them.

    Called on all ranks, since each may have a part of the vocabulary.
    """
    if output.mm_input_embeds is not None:
        return output.mm_input_embeds
    return getattr(model, "language_model", model).get_input_embeddings()(batch.input_ids)
