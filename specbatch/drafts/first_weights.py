"""The initial weights of a draft, the same for every number of ranks."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

FIRST_SCALE = 0.3
"""Initial weight of the final norm: scales the head's inputs. At full scale, untrained states would give confident
wrong predictions."""


def random_matrix(seed: int, name: str, shape: torch.Size) -> Tensor:
    """Return a float32 matrix, uniform in ``±1 / √inputs``: a pure function of its arguments.

    Args:
        seed: seed of the run.
        name: name of the parameter.
        shape: outputs, inputs.
    """
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    return torch.empty(shape).uniform_(-1, 1, generator=generator) * shape[1] ** -0.5


@torch.no_grad()
def fill(parameter: Tensor, full: Tensor) -> None:
    """Copy a whole tensor into a parameter that may be sharded."""
    full = full.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements)
    parameter.copy_(full)


@torch.no_grad()
def balance_inputs(weight: Tensor, mean_square: Tensor) -> None:
    """Scale the columns of a matrix so that all of its inputs have equal influence.

    Some channels of a large model are a thousand times larger than the others, and carry little information; they would
    dominate a random projection of all channels.

    Args:
        weight: ``[outputs, inputs]``, sharded by rows at most.
        mean_square: mean square of each input, ``[inputs]``.

    Raises:
        ValueError: the matrix is sharded by columns.
    """
    if isinstance(weight, DTensor):
        if any(placement.is_shard(1) for placement in weight.placements):
            raise ValueError("the projection must be sharded by rows")
        weight = weight.to_local()
    scale = mean_square.clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
    weight.mul_(scale.to(weight.device, weight.dtype))
