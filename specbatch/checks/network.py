"""The network between engines and trainers: RDMA has devices, and TCP carries what the engines give."""

from __future__ import annotations

from specbatch.config import Config
from specbatch.drafts.base import CaptureContract
from specbatch.errors import UserError
from specbatch.target import TargetShape

TCP_BYTES_PER_S = 3e9
"""Bytes per second that TCP carries into a node: as much as four threads of a fast engine put, and as a 25 GbE port
takes."""
HOST_TOKENS_PER_S = 2e5
"""Prompt tokens per second that an engine's host schedules at most (assumed), however small the target is."""


def check_devices(config: Config) -> None:
    """Check that RDMA has devices.

    Raises:
        UserError: it has none.
    """
    own = [getattr(config.slurm, name).devices for name in ("head", "inference", "training")]
    if config.store.protocol == "rdma" and not config.store.devices and not all(own):
        raise UserError(
            "store.devices: is empty, but store.protocol: rdma needs them; name them as `ibv_devices` does: mlx5_0, or "
            "set store.protocol: tcp"
        )


def warn_of_tcp(config: Config, shape: TargetShape, contract: CaptureContract, *, here: bool) -> list[str]:
    """Warn if engines on GPUs produce more per second than TCP carries into the training nodes."""
    from specbatch.planning.flops import active_weights
    from specbatch.planning.rates import ASSUMED_GPU, assumed_engine

    if here or config.store.protocol != "tcp" or not config.slurm.inference.gpus_per_node:
        return []
    engines, nodes = config.inference.engines, config.slurm.training.nodes
    active, kind = active_weights(shape), config.inference.gpu or ASSUMED_GPU
    engine = assumed_engine(kind, config.inference.tensor_parallel, active.format, experts=shape.experts is not None)
    tokens_per_s = min(engine.flops_per_s / (2 * max(active.count, 1)), HOST_TOKENS_PER_S)
    given = engines * tokens_per_s * contract.bytes_per_token
    carried = TCP_BYTES_PER_S * min(nodes, engines)
    if given <= carried:
        return []
    return [
        f"store.protocol: tcp: inference.engines: {engines} of about {tokens_per_s / 1000:.0f}k tokens/s "
        f"({engine.source}) produce {given / 1e9:.1f} GB of hidden states per second, but TCP carries about "
        f"{carried / 1e9:.1f} GB/s into slurm.training.nodes: {nodes}; set store.protocol: rdma and store.devices, or "
        "engines will wait"
    ]
