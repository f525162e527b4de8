"""A job in itself, before any cluster is asked: engines and ranks against nodes and GPUs, memory, time, directives.

A message names the fields that do not go together and a value that would do.
"""

from __future__ import annotations

import re
from typing import Any

from specbatch.config import Config
from specbatch.config.load import config_options
from specbatch.config.rules import Bytes
from specbatch.errors import UserError
from specbatch.launch.slurm.cluster import seconds
from specbatch.launch.slurm.script import Part, parts_of, requests

_MEMORY = {"": 20, "K": 10, "M": 20, "G": 30, "T": 40}


def check_shape(config: Config) -> list[str]:
    """Check what depends on the configuration alone.

    Returns:
        warnings, to be shown and not to be stopped by.

    Raises:
        UserError: the job can't work like this; the message begins with the key to change.
    """
    _check_site(config)
    _check_time(config)
    parts = {part.name: part for part in parts_of(config)}
    warnings = _check_engines(config, parts["inference"])
    warnings += _check_ranks(config, parts["training"])
    if config.slurm.layout == "single":
        _check_alike(config)
    else:
        _check_inherited(config)
    for name in parts:
        memory_bytes(config, name)
    return warnings


def memory_bytes(config: Config, component: str) -> int | None:
    """Memory of each node that a component asks for; 0: all that the node has; None: whatever the partition gives.

    Raises:
        UserError: it is written as Slurm doesn't.
    """
    text = getattr(config.slurm, component).mem
    if not text:
        return None
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", text, re.I)
    if found is None:
        raise UserError(
            f"slurm.{component}.mem: {text} is no size as Slurm writes it; write 64G, or 0 for all of a node"
        )
    return int(found[1]) << _MEMORY[found[2].upper()]


def lent_bytes(config: Config) -> int:
    """What the ranks of one training node lend the store together."""
    return config.training.ranks // config.slurm.training.nodes * config.store.bytes_per_rank


def limit_s(config: Config) -> float:
    """The time limit of an attempt.

    Raises:
        UserError: it is none.
    """
    limit = seconds(config.slurm.time)
    if not limit:
        raise UserError(
            f"slurm.time: {config.slurm.time} is no time limit; write it as hours:minutes:seconds, or "
            "days-hours:minutes:seconds"
        )
    return limit


def _check_site(config: Config) -> None:
    """What the site, by its profile, insists on and what it doesn't take."""
    slurm = config.slurm
    site = f"profile {slurm.profile}" if slurm.profile else "slurm.required"
    for key in slurm.required:
        if key not in config_options():
            raise UserError(f"slurm.required: {key} is no field of the configuration")
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        if value in ("", None, [], {}):
            raise UserError(
                f"{key}: is missing, and {site} says that this cluster wants it: {config_options()[key].text}"
            )
    forbidden = {name: why for name, why in slurm.forbidden.items() if why}
    for component, asked in requests(config).items():
        for name, value in asked.items():
            if value is not None and name in forbidden:
                raise UserError(
                    f"slurm.{component}: asks for --{name}={value}, which is forbidden here: {forbidden[name]}; "
                    f"leave it out, or take it away with slurm.extra: {{{name}: null}}"
                )


def _check_time(config: Config) -> None:
    limit, lead = limit_s(config), config.slurm.signal_s
    if lead > limit / 3:
        raise UserError(
            f"slurm.signal_s: {lead} is more than a third of slurm.time: {config.slurm.time}, so that little would be "
            f"trained between start and stop; set slurm.signal_s: {max(1, int(limit / 6))}, or a longer slurm.time"
        )


def _check_engines(config: Config, part: Part) -> list[str]:
    engines, degree, nodes = config.inference.engines, config.inference.tensor_parallel, part.nodes
    gpus = part.settings.gpus_per_node
    if engines < nodes:
        raise UserError(
            f"slurm.inference.nodes: {nodes} are more than inference.engines: {engines}, so some would do nothing; set "
            f"slurm.inference.nodes: {engines}, or inference.engines: {nodes}"
        )
    if not gpus:
        return []
    if degree > gpus:
        raise UserError(
            f"inference.tensor_parallel: {degree} GPUs of an engine are more than the {gpus} of a node "
            f"(slurm.inference.gpus_per_node), and an engine is on one node; set inference.tensor_parallel: {gpus}, or "
            "take nodes with more GPUs"
        )
    fit = gpus // degree
    if engines > fit * nodes:
        raise UserError(
            f"inference.engines: {engines} of inference.tensor_parallel: {degree} do not fit on slurm.inference.nodes: "
            f"{nodes} of slurm.inference.gpus_per_node: {gpus}; set slurm.inference.nodes: {-(-engines // fit)}, or "
            f"inference.engines: {fit * nodes}"
        )
    idle = nodes * gpus - engines * degree
    if not idle:
        return []
    return [
        f"inference.engines: {engines} of inference.tensor_parallel: {degree} leave {idle} of {nodes * gpus} GPUs "
        f"idle: {fit * nodes} engines would use {fit * nodes * degree}"
    ]


def _check_ranks(config: Config, part: Part) -> list[str]:
    ranks, nodes, gpus = config.training.ranks, part.nodes, part.settings.gpus_per_node
    if ranks % nodes:
        values = " or ".join(str(count) for count in (ranks // nodes * nodes, (ranks // nodes + 1) * nodes) if count)
        raise UserError(
            f"training.ranks: {ranks} can't be shared evenly by slurm.training.nodes: {nodes}; try training.ranks: "
            f"{values}"
        )
    each = ranks // nodes
    if gpus and each > gpus:
        enough = next(count for count in range(-(-ranks // gpus), ranks + 1) if ranks % count == 0)
        raise UserError(
            f"training.ranks: {ranks} on slurm.training.nodes: {nodes} are {each} a node, which has "
            f"slurm.training.gpus_per_node: {gpus}; set slurm.training.nodes: {enough}, or training.ranks: "
            f"{nodes * gpus}"
        )
    memory = memory_bytes(config, "training")
    if memory and lent_bytes(config) > memory:
        raise UserError(
            f"store.bytes_per_rank: {config.store.bytes_per_rank} of {each} ranks a node are "
            f"{size(lent_bytes(config))}, and slurm.training.mem: {part.settings.mem} is less; set a smaller "
            "store.bytes_per_rank, or more memory"
        )
    if gpus and each < gpus:
        return [f"training.ranks: {ranks} leave {(gpus - each) * nodes} of {gpus * nodes} GPUs idle"]
    return []


def _check_alike(config: Config) -> None:
    """In one homogeneous allocation all nodes are alike, and what training asks for is asked for."""
    slurm = config.slurm
    for name in ("partition", "gpus_per_node", "mem", "constraint", "extra"):
        ours, theirs = getattr(slurm.inference, name), getattr(slurm.training, name)
        if ours and ours != theirs:
            raise UserError(
                f"slurm.inference.{name}: {ours} is not slurm.training.{name}: {theirs or 'nothing'}, and with "
                "slurm.layout: single all nodes are alike; give both the same, or set slurm.layout: het"
            )


def _check_inherited(config: Config) -> None:
    """Slurm gives a component the memory of the one before it, if it asks for none."""
    before = ""
    for name, asked in requests(config).items():
        if (
            asked.get("mem") is None
            and asked.get("mem-per-cpu") is None
            and asked.get("mem-per-gpu") is None
            and before
        ):
            raise UserError(
                f"slurm.{name}.mem: is missing, and Slurm would give it that of the component before it, {before}; set "
                "it, or 0 for all that a node has"
            )
        before = asked.get("mem") or before


def size(count: int) -> str:
    """Bytes for people."""
    rounded = count >> 20 << 20
    return str(Bytes(rounded)) if rounded % (1 << 30) == 0 else f"{count / (1 << 30):.1f} GiB"
