"""Checks before anything is started: dependencies between fields, on the target's files, and on this machine.

Messages name both sides and a value that would work. `check` needs the configuration and the target; `check_plan` also
the corpus.
"""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from specbatch.config import Config
from specbatch.config.engine_nodes import nodes_per_engine
from specbatch.drafts.base import Algorithm, CaptureContract, algorithm_of
from specbatch.errors import UserError
from specbatch.evaluation.stored_states import check_measurable
from specbatch.gpu_kinds import gpu
from specbatch.gpus import listed_gpus
from specbatch.inference.arguments import RESERVED_TOKENS, engine_dtype, refusal, refuse_unknown
from specbatch.inference.classes import check_class
from specbatch.room import check_store, warn_of_store
from specbatch.rundir import RunDir
from specbatch.target import (
    PLAIN,
    TargetShape,
    bias_name,
    brings_code,
    embedding_name,
    head_name,
    locate,
    read_target,
    stored_head,
)
from specbatch.target.images import check_images
from specbatch.tokenizer_ids import tokenizer_ids
from specbatch.training.preflight import check_memory, check_ranks
from specbatch.units import bytes_text

TCP_BYTES_PER_S = 3e9
"""Bytes per second that TCP carries into a node: as much as four threads of a fast engine put, and as a 25 GbE port
takes."""
HOST_TOKENS_PER_S = 2e5
"""Prompt tokens per second that an engine's host schedules at most (assumed), however small the target is."""

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
        _check_run_dir(config)
    check_readable(config)
    shape = read_target(config.target.path)
    check_images(config, shape)
    check_answers(config, shape)
    if config.run.goal == "answers":
        if here and not config.data.regenerate.endpoint:
            _check_gpus(config)
        return []
    algorithm = algorithm_of(config, shape)
    _check_sglang(config)
    check_class(shape.architecture, shape.path)
    check_tensor_parallel(config, shape)
    check_ranks(config)
    _check_lengths(config, shape)
    check_logits(algorithm)
    check_reads_images(algorithm)
    warnings = [*algorithm.check(), *_check_vocabulary(shape)]
    _check_evaluate(config)
    warnings += _check_sweep(config, algorithm)
    _check_weights(config)
    check_memory(config, algorithm)
    for section, kind in (("inference", config.inference.gpu), ("training", config.training.gpu)):
        if kind:
            gpu(kind, f"{section}.gpu")
    if config.draft.init_from:
        warnings += algorithm.files.read_published().warnings
    warnings += warn_of_store(config, algorithm.contract)
    warnings += _warn_of_tcp(config, shape, algorithm.contract, here=here)
    if here:
        _check_gpus(config)
        if config.evaluate.prompts and not visible_gpus():
            check_measurable(config, algorithm)
        warnings += _warn_of_memory(config)
    warnings += _warn_of_evaluations(config)
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


def check_snapshot(folder: Path, algorithm: Algorithm) -> None:
    """Check that a run's snapshots belong to the draft that it is going to train.

    Args:
        folder: the snapshots.

    Raises:
        UserError: they belong to another one.
    """
    from specbatch.snapshot.manifest import differences, read_manifest, snapshot_path, whole_snapshots

    for step in whole_snapshots(folder)[-1:]:
        snapshot = snapshot_path(folder, step)
        before, now = read_manifest(snapshot).facts.get("draft", {}), algorithm.facts()
        if before.get("algorithm", now["algorithm"]) != now["algorithm"]:
            raise UserError(
                f"draft.algorithm: {now['algorithm']} can't continue from {snapshot}, which has a draft of "
                f"{before['algorithm']}; set draft.algorithm: {before['algorithm']}, or start a new run with another "
                "run.dir"
            )
        if changed := differences({"draft": before}, {"draft": now}):
            raise UserError(
                f"{snapshot} belongs to another training: {'; '.join(changed)}; set these back, or start a new run "
                "with another run.dir"
            )


def check_recording(config: Config, plan: Plan, contract: CaptureContract) -> str | None:
    """Return a text that says how many bytes recordings will take at most; None if nothing is recorded.

    Raises:
        UserError: the disk of the run directory has less room.
    """
    keep = config.snapshot.record
    if not keep:
        return None
    # Rows, and an id and a mask for each token. While a step is written, there is one more than are kept.
    each = contract.bytes_per_token + 9
    tokens = int(plan.step_sums(plan.lengths, plan.steps).max())
    most = (keep + 1) * tokens * each
    free = shutil.disk_usage(next(folder for folder in Path(config.run.dir).absolute().parents if folder.is_dir())).free
    if most > free:
        raise UserError(
            f"snapshot.record: {keep} steps of up to {tokens} tokens are {bytes_text(most)}, but {config.run.dir} has "
            f"{bytes_text(free)} free; record at most {max(0, int(free / (tokens * each)) - 1)}, or make room"
        )
    return f"recording the last {keep} steps in at most {bytes_text(most)}; {bytes_text(free)} are free"


def visible_gpus() -> int:
    """Return the number of NVIDIA GPUs of this machine that a process started here may use."""
    names = listed_gpus()
    return len(glob.glob("/dev/nvidia[0-9]*")) if names is None else len(names)


def _check_run_dir(config: Config) -> None:
    root = Path(config.run.dir)
    if root.exists() and not root.is_dir():
        raise UserError(f"run.dir: {root} is a file; give another path")
    if (root / "config.yaml").exists() and any((root / "attempts").glob("*")):
        raise UserError(
            f"run.dir: {root} exists already as a run; continue it with `specbatch resume {root}`, or give another "
            "run.dir"
        )
    # Data may have been prepared before the run begins.
    cache = Path(config.data.cache_dir).expanduser().absolute() if config.data.cache_dir else None
    foreign = [
        name for name in RunDir(root).foreign if cache is None or not cache.is_relative_to(root.absolute() / name)
    ]
    if foreign:
        shown = ", ".join(foreign[:3]) + (" ..." if len(foreign) > 3 else "")
        raise UserError(
            f"run.dir: {root} has files that do not belong to a run ({shown}) and could be overwritten; give the path "
            "of a new or empty directory"
        )
    parent = next(folder for folder in (root, *root.parents) if folder.is_dir())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"run.dir: {root}: no permission to write in {parent}; give another run.dir")


def check_readable(config: Config) -> None:
    """Check that the target exists and that this process may read its files, which often fails where groups share
    models.

    Raises:
        UserError: it does not exist, or a file can't be read.
    """
    folder = locate(config.target.path)
    try:
        closed = sorted(path for path in folder.iterdir() if path.is_file() and not os.access(path, os.R_OK))
    except PermissionError as error:
        raise UserError(f"target.path: no permission to read {folder}; ask its owner for it") from error
    except OSError:
        return
    if closed:
        raise UserError(f"target.path: no permission to read {closed[0]}; ask its owner for it, or copy the target")


def _check_sglang(config: Config) -> None:
    for name, value in config.inference.sglang.items():
        why = refusal(name, value, config.inference.deterministic)
        if why:
            raise UserError(f"inference.sglang.{name}: can't be set here: {why}")
    refuse_unknown(config.inference.sglang, "inference.sglang")


def check_logits(algorithm: Algorithm) -> None:
    """Check that the algorithm's loss uses the logits that the target samples from.

    Raises:
        UserError: it does not.
    """
    target = algorithm.target
    if not algorithm.changed_logits and (target.logits != PLAIN or bias_name(target) is not None):
        raise UserError(
            f"draft.algorithm: {algorithm.name} does not support what {target.path} does to its logits after the head "
            "(a factor, a softcap or a bias); choose another algorithm"
        )


def check_reads_images(algorithm: Algorithm) -> None:
    """Check that the algorithm's drafts read images as servers give them, if there are any.

    Raises:
        UserError: they don't.
    """
    if algorithm.config.data.images and not algorithm.reads_images:
        raise UserError(
            f"data.images: true: drafts of draft.algorithm: {algorithm.name} are not trained on images; choose another "
            "algorithm, or leave data.images out"
        )


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


def _check_lengths(config: Config, shape: TargetShape) -> None:
    longest, pack = config.data.max_tokens, config.training.tokens_per_pack
    if longest > pack:
        raise UserError(
            f"training.tokens_per_pack: {pack} is less than data.max_tokens: {longest}, so packs could not hold the "
            f"longest samples; set training.tokens_per_pack: {longest} or data.max_tokens: {pack}"
        )
    if longest > shape.max_positions:
        raise UserError(
            f"data.max_tokens: {longest} is more than the target's {shape.max_positions} positions; set "
            f"data.max_tokens: {shape.max_positions}"
        )
    # A sample's last token is not captured.
    context, needed = config.inference.sglang.get("context_length"), longest - 1 + RESERVED_TOKENS
    if isinstance(context, int) and context < needed:
        raise UserError(
            f"inference.sglang.context_length: {context} is too little for data.max_tokens: {longest}, since SGLang "
            f"keeps {RESERVED_TOKENS} positions for itself; set at least {needed}, or remove it"
        )
    if isinstance(context, int) and context > max(shape.max_positions, needed):
        raise UserError(
            f"inference.sglang.context_length: {context} is more than the target's {shape.max_positions} positions; "
            f"set {shape.max_positions}, or remove it"
        )
    pool = config.inference.sglang.get("max_total_tokens")
    if isinstance(pool, int) and pool < longest:
        raise UserError(
            f"inference.sglang.max_total_tokens: {pool} is less than data.max_tokens: {longest}, so the longest "
            f"samples could not be computed; set at least {longest}"
        )


def _check_vocabulary(shape: TargetShape) -> list[str]:
    warnings = []
    head_name(shape)
    stored = stored_head(shape)
    if shape.tied and stored and not shape.weights.same(stored, embedding_name(shape)):
        warnings.append(
            f"target.path: {shape.path} stores {stored}, which differs from its embedding, but config.json says "
            "tie_word_embeddings: true: SGLang uses the embedding as the head, and so does the training"
        )
    ids = tokenizer_ids(shape.path)
    beyond = {i: token for i, token in ids.items() if i >= shape.vocab}
    if beyond:
        named = ", ".join(f"{token} ({i})" for i, token in sorted(beyond.items())[:5])
        raise UserError(
            f"target.path: the tokenizer of {shape.path} has {len(beyond)} tokens that its embedding of {shape.vocab} "
            f"rows (vocab_size) has no row for: {named}; resize the embedding, or remove them from the tokenizer"
        )
    return warnings


def _check_evaluate(config: Config) -> None:
    if config.evaluate.prompts and not config.data.heldout:
        raise UserError(
            f"evaluate.prompts: {config.evaluate.prompts} come from data.heldout, which is empty; name files "
            "there, or set evaluate.prompts: 0"
        )
    if config.training.evaluate_interval_steps and not config.data.heldout:
        raise UserError(
            f"training.evaluate_interval_steps: {config.training.evaluate_interval_steps}: evaluations use "
            "data.heldout, which is empty; name files there, or leave it out"
        )
    both = next(
        (name for name in config.data.heldout if any(_within(name, train) for train in config.data.train)), None
    )
    if both:
        raise UserError(
            f"data.heldout: {both} is in data.train, too, so the draft would be evaluated on its training data; "
            "keep some conversations apart"
        )
    own = [getattr(config.slurm, name).devices for name in ("head", "inference", "training")]
    if config.store.protocol == "rdma" and not config.store.devices and not all(own):
        raise UserError(
            "store.devices: is empty, but store.protocol: rdma needs them; name them as `ibv_devices` does: mlx5_0, or "
            "set store.protocol: tcp"
        )


def _check_sweep(config: Config, algorithm: Algorithm) -> list[str]:
    from specbatch.evaluation.sets import read_sets
    from specbatch.evaluation.sweep import check_sweep

    if not config.evaluate.prompts:
        return []
    read_sets(config.evaluate.sets)
    return check_sweep(config, algorithm)


def _check_weights(config: Config) -> None:
    weights, entries = config.data.weights, config.data.train
    if weights and len(weights) != len(entries):
        raise UserError(
            f"data.weights: {len(weights)} weights for {len(entries)} entries of data.train; write each next to its "
            "entry: {path: a.jsonl, weight: 2}"
        )


def _within(name: str, other: str) -> bool:
    """Return whether a file, directory or data set is the same as another one or inside it, following links."""
    if name == other:
        return True
    inner, outer = Path(name).expanduser(), Path(other).expanduser()
    if not (inner.exists() and outer.exists()):
        return False
    inner, outer = inner.resolve(), outer.resolve()
    # Hidden files are never read as data.
    return inner.is_relative_to(outer) and not any(part.startswith(".") for part in inner.relative_to(outer).parts)


def _check_gpus(config: Config) -> None:
    there = visible_gpus()
    engines, degree = config.inference.engines, config.inference.tensor_parallel
    ranks = config.training.ranks if config.run.goal == "draft" else 0
    needed = ranks + engines * degree
    if there and needed > there and not ranks:
        raise UserError(
            f"inference.engines: {engines} of inference.tensor_parallel: {degree} need {needed} GPUs, but this machine "
            f"has {there}; set inference.engines: {max(1, there // degree)}"
        )
    if there and needed > there:
        raise UserError(
            f"training.ranks: {ranks} and inference.engines: {engines} of inference.tensor_parallel: {degree} need "
            f"{needed} GPUs, but this machine has {there}" + _advice(there, degree)
        )


def _advice(there: int, degree: int) -> str:
    ranks = there - degree
    if ranks >= 1:
        return f"; try training.ranks: {ranks} and inference.engines: 1"
    return "; use a machine with more, or hide its GPUs with CUDA_VISIBLE_DEVICES='' to run on its CPUs"


def _warn_of_tcp(config: Config, shape: TargetShape, contract: CaptureContract, *, here: bool) -> list[str]:
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


def _warn_of_memory(config: Config) -> list[str]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if config.training.ranks * config.store.bytes_per_rank <= memory:
        return []
    return [
        f"store.bytes_per_rank: {config.store.bytes_per_rank} of training.ranks: {config.training.ranks} are more than "
        f"this machine's memory of {bytes_text(memory)}"
    ]


def _warn_of_evaluations(config: Config) -> list[str]:
    every, kept = config.training.evaluate_interval_steps, config.snapshot.interval.steps
    if every is None or kept is None or every % kept == 0 or kept % every == 0:
        return []
    return [
        f"training.evaluate_interval_steps: {every} and snapshot.interval: {kept} seldom meet, and only a "
        "snapshot of an evaluated step can be kept as the best; let one be a multiple of the other"
    ]


def _warn_of_warmup(config: Config, steps: int) -> list[str]:
    if config.training.warmup_steps < steps:
        return []
    return [
        f"training.warmup_steps: {config.training.warmup_steps}: the run has only {steps} steps, so it never reaches "
        f"training.learning_rate: {config.training.learning_rate}; try {steps // 10}"
    ]
