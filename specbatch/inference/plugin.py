"""The capture plugin: what SGLang loads, through its own entry point, into each of its processes.

It does nothing unless the environment names `Settings`. Then it either captures or ends SGLang: before anything is
loaded, if SGLang is not the one that was hooked; when the scheduler starts, if a hook did not take or an argument
would break the capture.
"""

from __future__ import annotations

import inspect
import logging
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbatch.inference.orders import SETTINGS_VARIABLE

if TYPE_CHECKING:
    from specbatch.inference.capture import Capture

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
"""Arguments without which rows would be missing, or would not be a prefill's."""

_capture: Capture | None = None
"""Of this process: set in the scheduler of tensor-parallel rank 0."""


def register() -> None:
    """Entry point of the group ``sglang.srt.plugins``.

    Raises:
        SystemExit: if SGLang is not as expected. SGLang logs other exceptions of a plugin and goes on without it.
    """
    if SETTINGS_VARIABLE not in os.environ:
        return
    problems = [problem for target, names in EXPECTED.items() if (problem := mismatch(target, names))]
    if problems:
        raise SystemExit(f"specbatch: hidden states cannot be captured from this SGLang: {'; '.join(problems)}")
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(FORWARD, after_forward, HookType.AFTER)
    HookRegistry.register(SCHEDULER, after_scheduler_init, HookType.AFTER)


def mismatch(target: str, names: tuple[str, ...]) -> str | None:
    """Say why a place in SGLang is not as expected; None if it is."""
    try:
        found: Callable[..., Any] = pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        return f"{target} is missing ({error})"
    parameters = tuple(inspect.signature(found).parameters)
    return None if parameters[: len(names)] == names else f"{target} takes {parameters}, not {names}"


def after_scheduler_init(result: None, scheduler: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """See that everything took, then open the store.

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
    if get_parallel().tp_rank == 0:
        global _capture
        _capture = open_capture(Path(os.environ[SETTINGS_VARIABLE]))


def open_capture(settings_path: Path) -> Capture:
    """Connect to the attempt's store and register the memory that rows are sent from."""
    import msgspec
    import torch

    from specbatch.config import Store
    from specbatch.dispatch.rendezvous import wait_for
    from specbatch.inference.capture import Capture
    from specbatch.inference.orders import Settings
    from specbatch.inference.sender import Sender
    from specbatch.transfer.store import StoreClient

    settings = msgspec.json.decode(settings_path.read_bytes(), type=Settings)
    rendezvous = wait_for(Path(settings.rendezvous), settings.attempt, timeout_s=0.0)
    store = StoreClient(rendezvous, Store(protocol=settings.protocol, devices=settings.devices))
    memory = torch.empty(settings.buffer_bytes, dtype=torch.uint8, pin_memory=torch.accelerator.is_available())
    store.register(memory.data_ptr(), memory.numel())
    sender = Sender(settings, rendezvous.run, rendezvous.checksum_seed, store, memory)
    logger.info("specbatch captures hidden states buffer_bytes=%d widths=%s", memory.numel(), settings.widths)
    return Capture(settings.widths, sender)


def after_forward(result: Any, worker: Any, batch: Any = None, *args: Any, **kwargs: Any) -> None:
    """Hang the wanted rows of a prefill on its result, as one of SGLang's auxiliary outputs."""
    if _capture is None or batch is None or not batch.forward_mode.is_extend():
        return
    from sglang.srt.managers.auxiliary_output import append_auxiliary_output

    output = result.logits_output
    rows = _capture.gather(batch, output)
    if rows is not None:
        output.auxiliary_device_output = append_auxiliary_output(output.auxiliary_device_output, rows)
