"""Checks before anything is started: dependencies between fields, on the target's files, and on this machine.

Messages name both sides and a value that would work. `check` needs the configuration and the target; `check_plan` also
the corpus. Each other module has the checks of what it is named for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specbatch.checks.data import check_apart, check_lengths, check_weights
from specbatch.checks.engines import check_sglang, check_tensor_parallel
from specbatch.checks.evaluations import check_evaluate, check_measurements, warn_of_evaluations
from specbatch.checks.machine import check_gpus, visible_gpus, warn_of_memory
from specbatch.checks.network import check_devices, warn_of_tcp
from specbatch.checks.run_dir import check_run_dir
from specbatch.checks.target import check_logits, check_readable, check_reads_images, check_vocabulary
from specbatch.config import Config
from specbatch.config.engine_nodes import nodes_per_engine
from specbatch.drafts.base import Algorithm, algorithm_of
from specbatch.errors import UserError
from specbatch.evaluation.stored_states import check_measurable
from specbatch.gpu_kinds import gpu
from specbatch.inference.arguments import engine_dtype, refuse_unknown
from specbatch.inference.classes import check_class
from specbatch.room import check_store, warn_of_store
from specbatch.target import TargetShape, brings_code, read_target
from specbatch.target.images import check_images
from specbatch.training.preflight import check_memory, check_ranks

if TYPE_CHECKING:
    import numpy as np

    from specbatch.corpus import Corpus
    from specbatch.plan import Plan


def check(config: Config, *, new_run: bool = True, here: bool = True) -> list[str]:
    """Check a configuration before a new run.

    Args:
        new_run: whether ``run.dir`` has to be new.
        here: all components will run on this machine, with its GPUs and its memory.

    Returns:
        warnings, which do not prevent the run.

    Raises:
        UserError: the run can't work; the message begins with the key to change.
    """
    if new_run:
        check_run_dir(config)
    check_readable(config)
    shape = read_target(config.target.path)
    check_images(config, shape)
    check_answers(config, shape)
    if config.run.goal == "answers":
        if here and not config.data.regenerate.endpoint:
            check_gpus(config)
        return []
    algorithm = algorithm_of(config, shape)
    check_sglang(config)
    check_class(shape.architecture, shape.path)
    check_tensor_parallel(config, shape)
    check_ranks(config)
    check_lengths(config, shape)
    check_logits(algorithm)
    check_reads_images(algorithm)
    warnings = [*algorithm.check(), *check_vocabulary(shape)]
    check_evaluate(config)
    check_apart(config)
    check_devices(config)
    warnings += check_measurements(config, algorithm)
    check_weights(config)
    check_memory(config, algorithm)
    for section, kind in (("inference", config.inference.gpu), ("training", config.training.gpu)):
        if kind:
            gpu(kind, f"{section}.gpu")
    if config.draft.init_from:
        warnings += algorithm.files.read_published().warnings
    warnings += warn_of_store(config, algorithm.contract)
    warnings += warn_of_tcp(config, shape, algorithm.contract, here=here)
    if here:
        check_gpus(config)
        if config.evaluate.prompts and not visible_gpus():
            check_measurable(config, algorithm)
        warnings += warn_of_memory(config)
    warnings += warn_of_evaluations(config)
    if config.training.max_steps:
        warnings += _warn_of_warmup(config, config.training.max_steps)
    if not config.target.trust_remote_code and brings_code(shape):
        warnings.append(
            f"target.trust_remote_code: false: {shape.path} contains Python code (auto_map in config.json); "
            "if it can't be loaded without that code, read it and set target.trust_remote_code: true"
        )
    if config.target.dtype == "auto" and shape.dtype == "float32" and (not here or engine_dtype(config) == "auto"):
        warnings.append(
            "target.dtype: auto: the checkpoint is float32, which SGLang computes in float16; set target.dtype: "
            "bfloat16 or float32"
        )
    return warnings


def check_answers(config: Config, shape: TargetShape) -> None:
    """Check that the target can answer prompts as ``data.regenerate`` says, if that is set.

    Raises:
        UserError: it can't.
    """
    asked = config.data.regenerate
    if config.run.goal == "draft" and not asked.answers:
        return
    if config.data.weights:
        raise UserError("data.weights: belong to sources, but answers are a single source; leave them out")
    if asked.max_tokens and asked.max_tokens > shape.max_positions:
        raise UserError(
            f"data.regenerate.max_tokens: {asked.max_tokens} is more than the target's {shape.max_positions} positions"
        )
    if asked.endpoint:
        if not asked.endpoint.startswith(("http://", "https://")):
            raise UserError(f"data.regenerate.endpoint: {asked.endpoint} is not a URL like https://host:port/v1")
        return
    if (nodes := nodes_per_engine(config)) > 1:
        raise UserError(
            f"inference.nodes_per_engine: engines that answer prompts run on one node, not on {nodes}; "
            "let a server of your own answer: data.regenerate.endpoint"
        )
    refuse_unknown(config.inference.sglang, "inference.sglang")
    check_tensor_parallel(config, shape)


def check_plan(
    config: Config, plan: Plan, corpus: Corpus, algorithm: Algorithm, bytes_S: np.ndarray | None = None
) -> list[str]:
    """Check what depends on the prepared corpus: the algorithm's requirements, exact bytes, and the number of steps.

    Args:
        bytes_S: the result of `specbatch.room.stored_bytes`, if it is known already.

    Returns and raises as `check`.
    """
    if config.training.evaluate_interval_steps and not plan.heldout:
        raise UserError(
            "data.heldout: no sample can be used for evaluation (prompts without answers?); give "
            "conversations with answers, or leave training.evaluate_interval_steps out"
        )
    if config.data.images and config.evaluate.prompts and corpus.heldout and not corpus.heldout.part.prompts:
        raise UserError(
            "data.heldout: every prompt has images, and evaluate.prompts counts prompts without; add conversations "
            "without images, or set evaluate.prompts: 0"
        )
    warnings = algorithm.check_corpus(corpus)
    check_store(config, plan, corpus, algorithm, bytes_S)
    return warnings + _warn_of_warmup(config, min(plan.steps, config.training.max_steps or plan.steps))


def _warn_of_warmup(config: Config, steps: int) -> list[str]:
    if config.training.warmup_steps < steps:
        return []
    return [
        f"training.warmup_steps: {config.training.warmup_steps}: the run has only {steps} steps, so it never reaches "
        f"training.learning_rate: {config.training.learning_rate}; try {steps // 10}"
    ]
