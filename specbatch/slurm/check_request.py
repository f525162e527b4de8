"""Checks a job without asking a cluster: engines and ranks against nodes and GPUs, memory, time, directives.

A message names the fields that do not fit together, and a value that works.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from specbatch.config import Config
from specbatch.config.engine_nodes import nodes_per_engine
from specbatch.config.load import config_options
from specbatch.config.rules import Bytes
from specbatch.errors import UserError
from specbatch.free_ports import port_range
from specbatch.slurm.directives import requests
from specbatch.slurm.durations import slurm_seconds
from specbatch.slurm.parts import JobPart, parts_of
from specbatch.slurm.steps import other_root

_MEMORY = {"": 20, "K": 10, "M": 20, "G": 30, "T": 40}


def check_request(config: Config) -> list[str]:
    """Check what depends only on the configuration.

    Returns:
        warnings, which do not prevent the job.

    Raises:
        UserError: the job can't work; the message begins with the key to change.
    """
    _check_site(config)
    _check_time(config)
    warnings, parts = check_fit(config), {part.name for part in parts_of(config)}
    if config.slurm.layout == "single" and "training" in parts:
        _check_alike(config)
    else:
        _check_inherited(config)
    for name in parts:
        memory_bytes(config, name)
    return warnings


def check_fit(config: Config) -> list[str]:
    """Check engines and ranks against the nodes and GPUs of their components. Returns and raises as `check_request`."""
    port_range(config.slurm.ports)
    parts = {part.name: part for part in parts_of(config)}
    for name, part in parts.items():
        if other_root(part.settings) and not part.settings.python:
            raise UserError(
                f"slurm.{name}.python: is missing: a container need not have the Python that submits, "
                f"{sys.executable}; name the one in it that has specbatch, as python3 or /opt/venv/bin/python"
            )
    warnings = _check_engines(config, parts["inference"])
    return warnings + (_check_ranks(config, parts["training"]) if "training" in parts else [])


def memory_bytes(config: Config, component: str) -> int | None:
    """Return the memory that a component requests of each node: 0 for all of it, None for the partition's default.

    Raises:
        UserError: it is not in Slurm's format.
    """
    text = getattr(config.slurm, component).mem
    if not text:
        return None
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", text, re.I)
    if found is None:
        raise UserError(
            f"slurm.{component}.mem: {text} is not a size in Slurm's format; write 64G, or 0 for all of a node"
        )
    return int(found[1]) << _MEMORY[found[2].upper()]


def lent_bytes(config: Config) -> int:
    """Return the bytes that the ranks of one training node lend to the store together."""
    return config.training.ranks // config.slurm.training.nodes * config.store.bytes_per_rank


def fetched_bytes(config: Config, bytes_per_token: int) -> int:
    """Return the bytes of host memory into which the ranks of one training node fetch packs.

    Args:
        bytes_per_token: bytes of the hidden states of one token, by the draft's contract.
    """
    training = config.training
    packs = training.packs_per_step // (training.ranks // training.context_parallel)
    each = packs * (training.prefetch_steps + 1) * training.tokens_per_pack * bytes_per_token
    if config.slurm.training.gpus_per_node:
        # torch allocates pinned memory in blocks of powers of two.
        each = 1 << (each - 1).bit_length()
    return training.ranks // config.slurm.training.nodes * each


def check_node_memory(config: Config, bytes_per_token: int) -> None:
    """Check that a training node has the memory for the store and for fetched packs.

    Args:
        bytes_per_token: as for `fetched_bytes`.

    Raises:
        UserError: it asks for less.
    """
    memory = memory_bytes(config, "training")
    lent, fetched = lent_bytes(config), fetched_bytes(config, bytes_per_token)
    if memory and lent + fetched > memory:
        raise UserError(
            f"slurm.training.mem: {config.slurm.training.mem} is less than the {setting_text(lent)} that the ranks of "
            f"a node lend to the store (store.bytes_per_rank) and the {setting_text(fetched)} for fetched packs "
            f"(training.prefetch_steps: {config.training.prefetch_steps}); ask for more memory, or set less of either"
        )


def check_stage(config: Config, weights_bytes: int) -> None:
    """Check that an engine's node may hold a copy of the target in its memory, where it is to.

    Args:
        weights_bytes: of the target.

    Raises:
        UserError: it asks for less, or the directory is none that a node could have.
    """
    text, memory = config.slurm.stage_target, memory_bytes(config, "inference")
    if text and not text.startswith(("/", "$")):
        raise UserError(
            f"slurm.stage_target: {text} is no absolute path; give a directory of the engines' nodes, as /dev/shm or "
            "$TMPDIR, which is looked up there"
        )
    if text.startswith("/dev/shm") and memory and memory < weights_bytes:
        raise UserError(
            f"slurm.inference.mem: {config.slurm.inference.mem} is less than the {setting_text(weights_bytes)} of the "
            f"target's weights, which slurm.stage_target: {text} keeps in the node's memory; ask for more memory, 0 "
            "for all of it, or name a directory on a disk of the nodes"
        )


def limit_s(config: Config) -> float:
    """Return the time limit of an attempt, in seconds.

    Raises:
        UserError: it is not a time limit.
    """
    limit = slurm_seconds(config.slurm.time)
    if not limit:
        raise UserError(
            f"slurm.time: {config.slurm.time} is not a time limit; write it as hours:minutes:seconds, or "
            "days-hours:minutes:seconds"
        )
    return limit


def _check_site(config: Config) -> None:
    """Check what the site's profile requires and forbids."""
    slurm = config.slurm
    site = f"profile {slurm.profile}" if slurm.profile else "slurm.required"
    for key in slurm.required:
        if key not in config_options():
            raise UserError(f"slurm.required: {key} is not a field of the configuration")
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        if value in ("", None, [], {}):
            raise UserError(
                # The rest of the text says what happens elsewhere if it is empty.
                f"{key}: is missing, and {site} says that this cluster requires it: "
                f"{re.split('[.;]', config_options()[key].text)[0]}"
            )
    for component, asked in requests(config).items():
        for name, value in asked.items():
            refuse_forbidden(config, name, value, f"slurm.{component}: ")


def refuse_forbidden(config: Config, name: str, value: Any, where: str = "") -> None:
    """Check a directive, or an option of sbatch, against what the site forbids.

    Args:
        name: of the directive.
        value: None: it is not asked for.
        where: origin of the option, for the message.

    Raises:
        UserError: it is forbidden, or this value of it.
    """
    why = config.slurm.forbidden.get(name)
    if isinstance(why, dict):
        why = why.get(str(value))
        remedy = f"choose another, or allow it with slurm.forbidden.{name}: null"
    else:
        remedy = f"leave it out, or remove it with slurm.extra: {{{name}: null}}"
    if why and value is not None:
        raise UserError(f"{where}requests --{name}={value}, which is forbidden here: {why}; {remedy}")


def _check_time(config: Config) -> None:
    limit, lead = limit_s(config), config.slurm.signal_s
    if lead > limit / 3:
        raise UserError(
            f"slurm.signal_s: {lead} is more than a third of slurm.time: {config.slurm.time}, so little would be "
            f"trained between start and stop; set slurm.signal_s: {max(1, int(limit / 6))}, or a longer slurm.time"
        )


def _check_engines(config: Config, part: JobPart) -> list[str]:
    engines, degree, nodes = config.inference.engines, config.inference.tensor_parallel, part.nodes
    gpus = part.settings.gpus_per_node
    each = nodes_per_engine(config)
    if each > 1 or config.inference.nodes_per_engine:
        _check_spread(config, nodes, each)
    if each > 1:
        better = f"inference.tensor_parallel: {gpus * each} would use them"
        return _idle(nodes * gpus, engines, degree, better) if gpus else []
    if engines < nodes:
        raise UserError(
            f"slurm.inference.nodes: {nodes} are more than inference.engines: {engines}, so some would be idle; set "
            f"slurm.inference.nodes: {engines}, or inference.engines: {nodes}"
        )
    if not gpus:
        return []
    fit = gpus // degree
    if engines > fit * nodes:
        raise UserError(
            f"inference.engines: {engines} of inference.tensor_parallel: {degree} do not fit on slurm.inference.nodes: "
            f"{nodes} of slurm.inference.gpus_per_node: {gpus}; set slurm.inference.nodes: {-(-engines // fit)}, or "
            f"inference.engines: {fit * nodes}"
        )
    return _idle(nodes * gpus, engines, degree, f"{fit * nodes} engines would use {fit * nodes * degree}")


def _check_spread(config: Config, nodes: int, each: int) -> None:
    """Check that an engine larger than a node has its nodes for itself, with the same number of its GPUs on each."""
    inference, gpus = config.inference, config.slurm.inference.gpus_per_node
    degree = inference.tensor_parallel
    spread = f"inference.nodes_per_engine: {each}"
    if not inference.nodes_per_engine:
        spread = f"the {each} nodes that an engine needs where slurm.inference.gpus_per_node is {gpus}"
    if degree % each:
        values = " or ".join(str(count) for count in (degree // each * each, (degree // each + 1) * each) if count)
        raise UserError(
            f"inference.tensor_parallel: {degree} can't be shared evenly by {spread}; try inference.tensor_parallel: "
            f"{values}"
        )
    if gpus and degree // each > gpus:
        raise UserError(
            f"inference.tensor_parallel: {degree} on {spread} are {degree // each} GPUs a node, which has slurm."
            f"inference.gpus_per_node: {gpus}; set inference.nodes_per_engine: {-(-degree // gpus)}, or inference."
            f"tensor_parallel: {each * gpus}"
        )
    if each > 1 and nodes != inference.engines * each:
        fewer = f", or inference.engines: {nodes // each}" if nodes >= each and nodes % each == 0 else ""
        raise UserError(
            f"slurm.inference.nodes: {nodes} are not those of inference.engines: {inference.engines} with {spread}; "
            f"set slurm.inference.nodes: {inference.engines * each}{fewer}"
        )


def _idle(there: int, engines: int, degree: int, better: str) -> list[str]:
    idle = there - engines * degree
    if not idle:
        return []
    return [
        f"inference.engines: {engines} of inference.tensor_parallel: {degree} leave {idle} of {there} GPUs idle: "
        f"{better}"
    ]


def _check_ranks(config: Config, part: JobPart) -> list[str]:
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
            f"{setting_text(lent_bytes(config))}, and slurm.training.mem: {part.settings.mem} is less; set a smaller "
            "store.bytes_per_rank, or more memory"
        )
    if gpus and each < gpus:
        return [f"training.ranks: {ranks} leave {(gpus - each) * nodes} of {gpus * nodes} GPUs idle"]
    return []


def _check_alike(config: Config) -> None:
    """Check that in a homogeneous allocation, where training's request counts, inference requests the same nodes."""
    slurm = config.slurm
    for name in ("partition", "gpus_per_node", "mem", "constraint", "extra"):
        ours, theirs = getattr(slurm.inference, name), getattr(slurm.training, name)
        if ours and ours != theirs:
            raise UserError(
                f"slurm.inference.{name}: {ours} is not slurm.training.{name}: {theirs or 'nothing'}, and with "
                "slurm.layout: single all nodes are alike; set both to the same, or set slurm.layout: het"
            )


def _check_inherited(config: Config) -> None:
    """Check components without a memory request: Slurm would give them that of the previous component."""
    before = ""
    for name, asked in requests(config).items():
        if (
            asked.get("mem") is None
            and asked.get("mem-per-cpu") is None
            and asked.get("mem-per-gpu") is None
            and before
        ):
            raise UserError(
                f"slurm.{name}.mem: is missing, and Slurm would use that of the previous component, {before}; set "
                "it, or 0 for all that a node has"
            )
        before = asked.get("mem") or before


def setting_text(count: int) -> str:
    """Format bytes as a setting that can be copied: ``64GiB``; rounded if it would be long."""
    rounded = count >> 20 << 20
    return str(Bytes(rounded)) if rounded % (1 << 30) == 0 else f"{count / (1 << 30):.1f} GiB"
