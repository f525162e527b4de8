"""Computes how many nodes an engine spans, and the part of it on each. Pure."""

from __future__ import annotations

from specbatch.config.sections import Config


def nodes_per_engine(config: Config) -> int:
    """Return the number of nodes that an engine spans, as given or as its GPUs need; if several, only it uses them."""
    gpus = config.slurm.inference.gpus_per_node
    needed = -(-config.inference.tensor_parallel // gpus) if gpus else 1
    return config.inference.nodes_per_engine or needed


def gpus_of_engine(config: Config) -> int:
    """Return the number of an engine's GPUs, or tensor-parallel ranks, on each of its nodes."""
    return config.inference.tensor_parallel // nodes_per_engine(config)
