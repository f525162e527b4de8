"""Makes a configuration to start from, for a target and for nodes with GPUs of a known kind.

Choices follow from the target's files, the formulas of `specbatch plan` and common features of published recipes.
Nothing is measured. `document` writes the file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from specbatch.checks.engines import check_tensor_parallel
from specbatch.config.algorithms import default_algorithm, draft_section
from specbatch.config.rules import Bytes
from specbatch.config.sections import (
    Config,
    Data,
    Inference,
    Run,
    Slurm,
    SlurmComponent,
    Store,
    Target,
    Training,
)
from specbatch.drafts.base import Suggestion, algorithm_of
from specbatch.drafts.masks import Masks
from specbatch.errors import UserError
from specbatch.gpu_kinds import GPUS, gpu
from specbatch.inference.classes import check_class
from specbatch.inference.resolution import check_blocks, check_room, stored_bytes
from specbatch.planning.flops import active_weights, engine_flops
from specbatch.planning.rates import assumed_engine, assumed_rank
from specbatch.target import TargetShape, attention, read_target
from specbatch.training.preflight import RESERVE_BYTES

EPOCH_TOKENS = 600_000_000
"""Tokens of an epoch: 600,000 conversations of 1,000 tokens, the size of published corpora."""
SAMPLE_TOKENS, LEARNT = 1000, 0.75
"""Assumed tokens of a conversation, and the share that is learnt."""
STEP_TOKENS = 131_072
"""Tokens of an optimizer step in most recipes."""
_STATIC = 0.8
"""Least share of a GPU's memory that SGLang takes for weights and cache by default."""
_LARGE_BYTES = 300 << 30
"""Size of targets from which on published drafts use half the learning rate: Kimi-K2.5, DeepSeek-V3."""
_STORED_STEPS = 8
_CPUS_A_GPU = 8


@dataclass(frozen=True)
class AvailableNodes:
    """The available nodes."""

    gpu: str
    """Name of the kind in `specbatch.gpu_kinds.GPUS`."""
    gpus: int
    """Number of GPUs of a node."""
    nodes: int


@dataclass(frozen=True)
class Initial:
    """A configuration, and its expected speed and duration."""

    name: str
    """Name of the target."""
    config: Config
    draft: Suggestion
    target: TargetShape
    nodes: AvailableNodes
    engine_tokens_per_s: float
    """Speed of one engine."""
    trainer_tokens_per_s: float
    """Speed of all ranks together."""
    epoch_s: float
    """Seconds for `EPOCH_TOKENS`."""


def initial(path: str, nodes: AvailableNodes) -> Initial:
    """Choose a configuration.

    Args:
        path: path of the target.

    Raises:
        UserError: no draft can be trained for it, or not on these nodes.
    """
    target, kind = read_target(path), gpu(nodes.gpu, "--gpus")
    # In a hub's cache the last part of the path is a commit.
    name = target.path.name if Path(path).expanduser().is_dir() else path.rsplit("/", 1)[-1]
    check_class(target.architecture, target.path)
    config = Config(
        run=Run(dir=f"runs/{name}"),
        target=Target(path=path),
        data=Data(train=["train.jsonl"], heldout=["heldout.jsonl"], max_tokens=min(4096, target.max_positions)),
        draft=draft_section(default_algorithm())(),
        inference=Inference(gpu=nodes.gpu),
    )
    large = stored_bytes(target) > _LARGE_BYTES
    draft = algorithm_of(config, target).suggestion(large=large)
    config.draft = draft.draft
    degree = _tensor_parallel(config, target, nodes)
    config.inference.tensor_parallel = degree
    engine_rate, rank_rate = _rates(config, target, nodes)
    engine_nodes, engines, ranks = _split(nodes, degree, engine_rate, rank_rate)
    config.inference.engines = engines
    config.inference.packs_in_flight = 4
    config.training = Training(
        ranks=ranks,
        gpu=nodes.gpu,
        tokens_per_pack=8192,
        learning_rate=5e-5 if large else 1e-4,
        max_grad_norm=1.0 if large else 0.5,
        warmup_steps=100,
        evaluate_interval_steps=200,
    )
    _fit_memory(config, target, kind.memory_bytes)
    training = config.training
    training.packs_per_step = ranks * max(1, round(STEP_TOKENS / training.tokens_per_pack / ranks))
    config.store = _store(config, target, nodes)
    if nodes.nodes > 1:
        config.slurm = _slurm(nodes, engine_nodes, degree)
    seconds = max(EPOCH_TOKENS / (engines * engine_rate), EPOCH_TOKENS / (ranks * rank_rate))
    return Initial(name, config, draft, target, nodes, engine_rate, ranks * rank_rate, seconds)


def _tensor_parallel(config: Config, target: TargetShape, nodes: AvailableNodes) -> int:
    """Return the fewest GPUs that can hold the target: of one node, or of several whole nodes."""
    why = ""
    several = [nodes.gpus * count for count in range(2, nodes.nodes)]
    for degree in [*(count for count in (1, 2, 4, 8, 16) if count <= nodes.gpus), *several]:
        tried = replace(config, inference=replace(config.inference, tensor_parallel=degree))
        try:
            check_tensor_parallel(tried, target)
            check_blocks(tried, target)
            check_room(tried, target, GPUS[nodes.gpu], _STATIC)
        except UserError as error:
            why = str(error)
            continue
        return degree
    raise UserError(
        f"--gpus: {nodes.gpu}:{nodes.gpus}: no engine fits one such node, or all but one of --nodes {nodes.nodes}: "
        f"{why}; use more nodes, nodes with more or larger GPUs, or a quantised checkpoint of the target"
    )


def _rates(config: Config, target: TargetShape, nodes: AvailableNodes) -> tuple[float, float]:
    """Return tokens per second of an engine and of a rank."""
    mask = np.arange(SAMPLE_TOKENS) >= SAMPLE_TOKENS * (1 - LEARNT)
    costs = algorithm_of(config, target).costs(Masks.of([mask]))
    active = active_weights(target)
    engine = assumed_engine(
        nodes.gpu, config.inference.tensor_parallel, active.format, experts=target.experts is not None
    )
    of_engine = float(engine_flops(attention(target), active.count, costs.captured_S)[0])
    of_rank = float(costs.flops_S[0])
    return (
        SAMPLE_TOKENS * engine.flops_per_s / of_engine,
        SAMPLE_TOKENS * assumed_rank(nodes.gpu).flops_per_s / of_rank,
    )


def _split(nodes: AvailableNodes, degree: int, engine_rate: float, rank_rate: float) -> tuple[int, int, int]:
    """Return the number of engine nodes, engines and ranks that takes the least time. Components share a node only if
    there is just one."""
    if nodes.nodes == 1:
        choices = [
            (1, n, nodes.gpus - n * degree) for n in range(1, nodes.gpus // degree + 1) if n * degree < nodes.gpus
        ]
    else:
        each, whole = max(1, nodes.gpus // degree), -(-degree // nodes.gpus)
        choices = [(n, n // whole * each, (nodes.nodes - n) * nodes.gpus) for n in range(whole, nodes.nodes, whole)]
    if not choices:
        raise UserError(
            f"--nodes: {nodes.nodes}: an engine takes all {nodes.gpus} GPUs of a node, but ranks need some, too; give "
            "--nodes 2"
        )
    return min(choices, key=lambda choice: max(1 / (choice[1] * engine_rate), 1 / (choice[2] * rank_rate)))


def _fit_memory(config: Config, target: TargetShape, memory: int) -> None:
    """Turn on recomputation, then halve packs, until training fits a rank's GPU."""
    training = config.training
    for tokens in (8192, 4096):
        training.tokens_per_pack = max(tokens, config.data.max_tokens)
        for what in ("none", "all_but_attention", "all"):
            training.recompute = what
            if sum(algorithm_of(config, target).memory().values()) <= memory - RESERVE_BYTES:
                return
    raise UserError(
        f"--gpus: {config.training.gpu}: a rank of the draft for {target.path} does not fit; use larger GPUs, more "
        "nodes, or training.context_parallel"
    )


def _store(config: Config, target: TargetShape, nodes: AvailableNodes) -> Store:
    training = config.training
    token = algorithm_of(config, target).contract.bytes_per_token
    step = training.packs_per_step * training.tokens_per_pack * token
    gib = 4
    while gib << 30 < _STORED_STEPS * step / training.ranks:
        gib *= 2
    several = nodes.nodes > 1
    return Store(
        protocol="rdma" if several else "tcp", devices="mlx5_0" if several else "", bytes_per_rank=Bytes(gib << 30)
    )


def _slurm(nodes: AvailableNodes, engine_nodes: int, degree: int) -> Slurm:
    def component(count: int, cpus: int) -> SlurmComponent:
        return SlurmComponent(nodes=count, gpus_per_node=nodes.gpus, cpus_per_task=cpus, mem="0")

    return Slurm(
        head=SlurmComponent(cpus_per_task=4, mem="16G"),
        inference=component(engine_nodes, _CPUS_A_GPU * min(degree, nodes.gpus)),
        training=component(nodes.nodes - engine_nodes, _CPUS_A_GPU * nodes.gpus),
    )
