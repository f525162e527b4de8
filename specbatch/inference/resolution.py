"""Finds how SGLang resolves an engine's arguments on a given kind of GPU, which need not be present.

SGLang determines memory fraction, backends and quantisation before it loads weights, and refuses impossible
combinations. It is asked here in a separate process that pretends to have that GPU, by SGLang's own
`override_platform`. So arguments that it would refuse after an hour in the queue are refused in half a minute.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from specbatch.config.engine_nodes import nodes_per_engine
from specbatch.drafts.base import algorithm_of
from specbatch.drafts.sglang import layer_ids
from specbatch.errors import UserError
from specbatch.gpu_kinds import Gpu, gpu
from specbatch.inference.arguments import engine_arguments, engine_environment, sglang_argument_names
from specbatch.inference.command import command_line, parts_arguments

if TYPE_CHECKING:
    from specbatch.config import Config
    from specbatch.target import TargetShape

ASK_TIMEOUT_S = 300.0
SETTLED = ("mem_fraction_static", "attention_backend", "chunked_prefill_size", "max_prefill_tokens")
"""Arguments whose resolved values are read."""
_ANSWER = "specbatch: "
_STORED = ("awq", "awq_marlin", "gptq", "gptq_marlin", "compressed-tensors", "modelopt_fp4", "w8a8_int8", "gguf")
"""Quantisation methods that SGLang does not apply itself while it loads a target."""


def check_engine(config: Config, target: TargetShape) -> list[str]:
    """Check that SGLang would start with a run's arguments on ``inference.gpu``, with room for the target and a sample.

    Returns:
        warnings, if SGLang could not be asked. It is not asked if no GPU is named or it is not installed.

    Raises:
        UserError: SGLang would not start.
    """
    if not config.inference.gpu or not sglang_argument_names():
        return []
    from specbatch.inference.capture_server import capture_arguments

    kind = gpu(config.inference.gpu, "inference.gpu")
    check_quantization(config, target)
    check_blocks(config, target)
    arguments = engine_arguments(config, target, kind.memory_bytes)
    nodes = nodes_per_engine(config)
    if nodes > 1:
        arguments |= parts_arguments(nodes, 0, "localhost:1024")  # nothing connects to it
    captured = capture_arguments(layer_ids(target.architecture, algorithm_of(config, target).contract.layers))
    settled, why = resolve(arguments | captured, kind, engine_environment(config, target))
    if settled is None:
        return [f"inference.gpu: {config.inference.gpu}: SGLang could not be asked beforehand: {why}"]
    check_room(config, target, kind, float(settled["mem_fraction_static"] or 0))
    return []


def resolve(
    arguments: Mapping[str, Any], kind: Gpu, environment: Mapping[str, str] | None = None
) -> tuple[dict[str, Any] | None, str]:
    """Ask SGLang to resolve arguments.

    Args:
        arguments: as for `specbatch.inference.server.SGLangServer`.
        environment: further variables of the process.

    Returns:
        the resolved values of `SETTLED`; or None, and why SGLang could not be asked.

    Raises:
        UserError: SGLang refuses the arguments; with its message.
    """
    question = {"words": command_line({**arguments, "device": "cuda"}), "gpu": asdict(kind)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            check=False,
            timeout=ASK_TIMEOUT_S,
            env={**os.environ, **(environment or {}), "SGLANG_PLUGINS": ""},
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer in {ASK_TIMEOUT_S:.0f} s"
    answers = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if not answers:
        return None, " ".join(done.stderr.strip().splitlines()[-1:]) or f"it ended with {done.returncode}"
    answer = json.loads(answers[-1].removeprefix(_ANSWER))
    if "refused" in answer:
        raise UserError(f"inference.sglang: SGLang refuses these arguments on an {kind.name}: {answer['refused']}")
    return answer, ""


def check_quantization(config: Config, target: TargetShape) -> None:
    """Check that the target's files are quantised as the engine's arguments say.

    Raises:
        UserError: SGLang would look for scales that the files do not have.
    """
    told = config.inference.sglang.get("quantization")
    if told in _STORED and not target.quantization:
        raise UserError(
            f"inference.sglang.quantization: {told} needs a checkpoint that is stored so, but {target.path} has no "
            "quantization_config; leave it out, or use such a checkpoint"
        )


def check_blocks(config: Config, target: TargetShape) -> None:
    """Check that experts quantised in blocks can be cut into as many parts as an engine has GPUs.

    Raises:
        UserError: SGLang would refuse it when it loads the weights.
    """
    block = target.quantization.get("weight_block_size")
    degree = config.inference.tensor_parallel
    if not block or target.experts is None or any(key in config.inference.sglang for key in ("ep_size", "ep")):
        return
    width = target.experts.width
    if width % (degree * int(block[0])) == 0:
        return
    fits = [count for count in (1, 2, 4, 8, 16) if count < degree and width % (count * int(block[0])) == 0]
    raise UserError(
        f"inference.tensor_parallel: {degree} cuts the target's experts of {width} columns into parts that are not a "
        f"multiple of the {block[0]} columns of a block of its weights, which SGLang does not load; try "
        f"{max(fits, default=1)}, or inference.sglang.ep_size: {degree}"
    )


def check_room(config: Config, target: TargetShape, kind: Gpu, fraction: float) -> None:
    """Check that weights and the keys and values of the longest sample fit into SGLang's share of a GPU.

    Args:
        fraction: ``mem_fraction_static``.

    Raises:
        UserError: they do not fit.
    """
    degree, longest = config.inference.tensor_parallel, config.data.max_tokens
    weights = stored_bytes(target)
    pool = longest * cache_bytes(target, degree)
    needed = weights / degree + pool
    if needed <= fraction * kind.memory_bytes:
        return
    enough = next((n for n in (1, 2, 4, 8, 16, 32) if weights / n + pool <= 0.8 * kind.memory_bytes), None)
    hint = "" if enough is None or enough <= degree else f"; try inference.tensor_parallel: {enough}"
    if weights / degree + pool <= 0.8 * kind.memory_bytes:
        hint = "; try inference.sglang.mem_fraction_static: 0.8"
    raise UserError(
        f"inference.tensor_parallel: {degree}: a GPU's share of the target's {weights / 2**30:.0f} GiB and of data."
        f"max_tokens: {longest} is {needed / 2**30:.1f} GiB, but SGLang uses only {fraction:.3f} of the "
        f"{kind.memory_bytes / 2**30:.1f} GiB of an {kind.name} for both{hint}"
    )


def stored_bytes(target: TargetShape) -> int:
    """Return the bytes of the target's tensors."""
    return sum(stored.end - stored.begin for stored in target.weights.tensors.values())


def cache_bytes(target: TargetShape, degree: int) -> int:
    """Return the bytes of a token's keys and values on a GPU, with two bytes per value, if every layer keeps them."""
    from specbatch.target import latent_width

    latent = latent_width(target)
    width = latent or 2 * math.ceil(target.kv_heads / degree) * target.head_dim
    return 2 * target.layers * width


def _ask() -> None:
    """Run in the separate process: read the question, write the answer."""
    import sglang.srt.platforms as platforms
    from sglang.srt.platforms.cuda import CudaSRTPlatform
    from sglang.srt.runtime_context import override_platform

    question = json.load(sys.stdin)
    kind = question["gpu"]
    major, minor = kind["capability"]
    platforms._current_platform = CudaSRTPlatform()  # otherwise a plugin's, if there is no GPU
    override_platform(
        **dict.fromkeys(("is_hip", "is_npu", "is_xpu", "is_musa", "is_mps", "is_sm110", "is_sm120"), False),
        is_cuda=True,
        is_sm90=major == 9,
        is_sm100=major == 10,
        is_sm100_or_sm110=major == 10,
        is_blackwell=major == 10,
        is_hopper_with_cuda_12_3=major == 9,
        has_flashinfer=True,
        device_sm=10 * major + minor,
        device_capability=(major, minor),
    ).install()
    from sglang.srt.arg_groups import memory_hook
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolved_view
    from sglang.srt.layers import quantization
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config
    from sglang.srt.server_args import prepare_server_args

    def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise ValueError(message)

    argparse.ArgumentParser.error = refuse  # type: ignore[method-assign, assignment]
    # SGLang registers it only if CUDA's libraries exist.
    quantization.QUANTIZATION_METHODS.setdefault("mxfp4", Mxfp4Config)
    memory_hook.get_device_memory_capacity = lambda device=None: kind["memory_mib"]
    try:
        arguments = prepare_server_args(question["words"])
        arguments.resolve_once()
        method = model_config_of(arguments).quantization
        ask = quantization.get_quantization_config(method).get_min_capability if method else None
        # For some methods it depends on the layer.
        least = ask() if inspect.ismethod(ask) else 0
        if least > 10 * major + minor:
            raise ValueError(f"{method} needs a GPU of compute capability {least / 10} or more")
    except Exception as error:  # any kind: SGLang's messages for people
        answer: dict[str, Any] = {"refused": " ".join(f"{error}".split()) or type(error).__name__}
    else:
        settled = resolved_view(arguments)
        answer = {name: getattr(settled, name, None) for name in SETTLED}
    print(f"\n{_ANSWER}{json.dumps(answer, default=str)}")


if __name__ == "__main__":
    _ask()
