"""The engines: SGLang takes its arguments, and the GPUs of an engine can share the target."""

from __future__ import annotations

from specbatch.config import Config
from specbatch.errors import UserError
from specbatch.inference.arguments import refusal, refuse_unknown
from specbatch.target import TargetShape


def check_sglang(config: Config) -> None:
    """Check that SGLang has the arguments that are passed to it, and that none breaks the capture.

    Raises:
        UserError: one does, or is unknown.
    """
    for name, value in config.inference.sglang.items():
        why = refusal(name, value, config.inference.deterministic)
        if why:
            raise UserError(f"inference.sglang.{name}: can't be set here: {why}")
    refuse_unknown(config.inference.sglang, "inference.sglang")


def check_tensor_parallel(config: Config, shape: TargetShape) -> None:
    """Check that the target can be divided among the GPUs of an engine.

    Raises:
        UserError: it can't.
    """
    degree = config.inference.tensor_parallel
    # Each GPU has a share of the key heads, or a copy of one head if there are fewer heads than GPUs.
    shares = {"attention heads": shape.heads}
    if shape.experts is None or shape.experts.dense_first:
        shares["columns of its MLP"] = shape.intermediate
    elif not any(key in config.inference.sglang for key in ("ep_size", "ep", "expert_parallel_size")):
        shares["columns of an expert"] = shape.experts.width
    wrong = next((f"{count} {name}" for name, count in shares.items() if count % degree), None)
    if wrong is None and shape.kv_heads % degree and degree % shape.kv_heads:
        wrong = f"{shape.kv_heads} key heads"
    if wrong is None:
        return
    fits = [
        count
        for count in range(1, shape.heads + 1)
        if not any(total % count for total in shares.values())
        and (shape.kv_heads % count == 0 or count % shape.kv_heads == 0)
    ]
    near = [max((count for count in fits if count < degree), default=None)]
    near.append(min((count for count in fits if count > degree), default=None))
    values = " or ".join(str(count) for count in near if count)
    raise UserError(f"inference.tensor_parallel: {degree} does not divide the target's {wrong}; try {values}")
