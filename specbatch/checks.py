"""What depends on two fields, on the target's files or on this machine, checked before anything is started.

A message names both sides and a value that would do. `check` knows the configuration and the target; `check_plan`
what the corpus has made of them.
"""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from specbatch.capture import BYTES_PER_VALUE, CaptureContract
from specbatch.config import Config
from specbatch.config.rules import Bytes
from specbatch.errors import UserError
from specbatch.inference.arguments import RESERVED_TOKENS, refusal, refuse_unknown
from specbatch.target import TargetShape, aux_layers, brings_code, embedding_name, head_name, read_target, stored_head
from specbatch.tokens import tokenizer_ids
from specbatch.training.budget import check_memory, check_ranks
from specbatch.training.drafts import files

if TYPE_CHECKING:
    from specbatch.corpus import Corpus
    from specbatch.plan import Plan


def check(config: Config, *, new_run: bool = True, here: bool = True) -> list[str]:
    """Check a configuration before a new run.

    Args:
        new_run: whether ``run.dir`` has to be free.
        here: all components will run on this machine, with its GPUs and its memory.

    Returns:
        warnings, to be shown and not to be stopped by.

    Raises:
        UserError: it can't work; the message begins with the key to change.
    """
    if new_run:
        _check_run_dir(config)
    shape = read_target(config.target.path)
    _check_sglang(config)
    _check_tensor_parallel(config, shape)
    check_ranks(config)
    _check_lengths(config, shape)
    _check_layers(config, shape)
    warnings = _check_vocabulary(config, shape)
    _check_evaluate(config)
    check_memory(config, shape)
    if config.draft.init_from:
        warnings += files(config.draft.algorithm).read_published(config, shape).warnings
    warnings += _warn_of_store(config, shape)
    if here:
        _check_gpus(config)
        warnings += _warn_of_memory(config)
    warnings += _warn_of_evaluations(config)
    if config.training.max_steps:
        warnings += _warn_of_warmup(config, config.training.max_steps)
    if not config.target.trust_remote_code and brings_code(shape):
        warnings.append(
            f"target.trust_remote_code: false: {shape.path} brings Python code of its own (auto_map in config.json); "
            "if it can't be loaded without, read that code and set target.trust_remote_code: true"
        )
    if config.target.dtype == "auto" and shape.dtype == "float32":
        warnings.append(
            "target.dtype: auto: the checkpoint is float32, which SGLang computes in float16; set target.dtype: "
            "bfloat16 or float32"
        )
    return warnings


def check_plan(config: Config, plan: Plan, corpus: Corpus, contract: CaptureContract) -> list[str]:
    """Check what is known once the corpus is: exact bytes, and the number of steps. Returns and raises as `check`."""
    if config.training.evaluate_interval_steps and not plan.heldout:
        raise UserError(
            "data.heldout: no sample of it has anything to evaluate on (prompts without answers?); give it "
            "conversations with answers, or leave training.evaluate_interval_steps out"
        )
    check_store(config, plan, corpus, contract)
    return _warn_of_warmup(config, min(plan.steps, config.training.max_steps or plan.steps))


def check_recording(config: Config, plan: Plan, contract: CaptureContract) -> str | None:
    """How many bytes recordings will take at most, for people; None if nothing is recorded.

    Raises:
        UserError: the disk of the run directory has not that much room.
    """
    keep = config.snapshot.record
    if not keep:
        return None
    # Rows, and an id and a mask for each token. One step more than is kept is there while the next is written.
    each = BYTES_PER_VALUE * sum(contract.widths.values()) + 9
    tokens = max(sum(plan.tokens(pack) for pack in plan.packs(step)) for step in range(1, plan.steps + 1))
    most = (keep + 1) * tokens * each
    free = shutil.disk_usage(next(folder for folder in Path(config.run.dir).absolute().parents if folder.is_dir())).free
    if most > free:
        raise UserError(
            f"snapshot.record: {keep} steps of up to {tokens} tokens are {_size(most)}, and {config.run.dir} has "
            f"{_size(free)} free; record at most {max(0, int(free / (tokens * each)) - 1)}, or make room"
        )
    return f"recording the last {keep} steps in at most {_size(most)}; {_size(free)} are free"


def check_store(config: Config, plan: Plan, corpus: Corpus, contract: CaptureContract) -> None:
    """Check that the store holds the largest step, and each of its objects; less, and the run would wait for ever.

    Raises:
        UserError: it does not.
    """
    room, segment = store_room(config)
    most = BYTES_PER_VALUE * sum(contract.widths.values())
    widest = BYTES_PER_VALUE * max(contract.widths.values())

    def exact(sample: int) -> int:
        return contract.bytes(corpus.sample(sample).loss_mask)

    of_heldout = [sample for pack in plan.heldout for sample in pack.samples]
    for sample in [*np.flatnonzero(plan.lengths * widest > segment).tolist(), *of_heldout]:
        rows = contract.rows(corpus.sample(sample).loss_mask)
        largest = max(BYTES_PER_VALUE * contract.widths[name] * rows[name].size for name in rows)
        if largest > segment:
            raise UserError(
                f"store.bytes_per_rank: {config.store.bytes_per_rank} holds no object of more than {_size(segment)}, "
                f"and a sample of {corpus.sample(sample).input_ids.size} tokens makes one of {_size(largest)}; set "
                f"store.bytes_per_rank: {_enough(config, largest)}, or a smaller data.max_tokens"
            )
    heldout = sum(map(exact, of_heldout))
    for step in range(1, plan.steps + 1):
        samples = [sample for pack in plan.packs(step) for sample in pack.samples]
        if int(plan.lengths[samples].sum()) * most + heldout <= room:
            continue
        needed = sum(map(exact, samples))
        if needed <= room < needed + heldout:
            # Any step may be the first after a restart, and held-out packs are computed again then.
            each = _enough(config, -(-(needed + heldout) // config.training.ranks))
            raise UserError(
                f"training.evaluate_packs: {config.training.evaluate_packs} are {_size(heldout)}, which the store must "
                f"hold beside any step, and step {step} is {_size(needed)}; store.bytes_per_rank: "
                f"{config.store.bytes_per_rank} of training.ranks: {config.training.ranks} hold {_size(room)}; set "
                f"store.bytes_per_rank: {each}, or fewer training.evaluate_packs"
            )
        if needed > room:
            each = _enough(config, -(-needed // config.training.ranks))
            raise UserError(
                f"store.bytes_per_rank: {config.store.bytes_per_rank} of training.ranks: {config.training.ranks} hold "
                f"{_size(room)}, and the hidden states of step {step} are {_size(needed)}; set store.bytes_per_rank: "
                f"{each}, or a smaller training.packs_per_step"
            )


def visible_gpus() -> int:
    """NVIDIA GPUs of this machine that a process started here may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def _check_run_dir(config: Config) -> None:
    root = Path(config.run.dir)
    if root.exists() and not root.is_dir():
        raise UserError(f"run.dir: {root} is a file; give another path")
    if (root / "config.yaml").exists() and any((root / "attempts").glob("*")):
        raise UserError(
            f"run.dir: {root} is a run already; go on with it by `specbatch resume {root}`, or give another run.dir"
        )
    parent = next(folder for folder in (root, *root.parents) if folder.is_dir())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"run.dir: {root}: no permission to write in {parent}; give another run.dir")


def _check_sglang(config: Config) -> None:
    for name in config.inference.sglang:
        why = refusal(name, config.inference.deterministic)
        if why:
            raise UserError(f"inference.sglang.{name}: can't be set here: {why}")
    refuse_unknown(config.inference.sglang, "inference.sglang")


def _check_tensor_parallel(config: Config, shape: TargetShape) -> None:
    degree = config.inference.tensor_parallel
    # A rank has its share of the key heads, or a copy of one where there are fewer.
    shares = {"attention heads": shape.heads, "columns of its MLP": shape.intermediate}
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
            f"training.tokens_per_pack: {pack} is less than data.max_tokens: {longest}, so no pack could hold the "
            f"longest samples; set training.tokens_per_pack: {longest} or data.max_tokens: {pack}"
        )
    if longest > shape.max_positions:
        raise UserError(
            f"data.max_tokens: {longest} is more than the target's {shape.max_positions} positions; set "
            f"data.max_tokens: {shape.max_positions}"
        )
    # Of a sample's last token nothing is ever captured.
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


def _check_layers(config: Config, shape: TargetShape) -> None:
    chosen = aux_layers(config, shape)
    if config.draft.aux_layers is None:
        return
    default = "leave it out for a low, a middle and a high one"
    if len(chosen) != 3 or list(chosen) != sorted(set(chosen)):
        raise UserError(
            f"draft.aux_layers: {list(chosen)}: {config.draft.algorithm} reads three distinct layers in ascending "
            f"order; {default}"
        )
    if chosen[-1] > shape.layers - 2:
        raise UserError(
            f"draft.aux_layers: {chosen[-1]} can't be read of the target's {shape.layers} layers: the last that can is "
            f"{shape.layers - 2}, since SGLang does not give out the last layer's output; {default}"
        )


def _check_vocabulary(config: Config, shape: TargetShape) -> list[str]:
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
            f"rows (vocab_size) has no row for: {named}; resize the embedding, or take them out of the tokenizer"
        )
    most = len(ids) or shape.vocab
    if config.draft.vocab_size and config.draft.vocab_size > most:
        raise UserError(
            f"draft.vocab_size: {config.draft.vocab_size} is more than the target's {most} tokens; set "
            "draft.vocab_size: null for all of them"
        )
    return warnings


def _check_evaluate(config: Config) -> None:
    if config.evaluate.prompts and not config.data.heldout:
        raise UserError(
            f"evaluate.prompts: {config.evaluate.prompts} are taken from data.heldout, which is empty; name files "
            "there, or set evaluate.prompts: 0"
        )
    if config.training.evaluate_interval_steps and not config.data.heldout:
        raise UserError(
            f"training.evaluate_interval_steps: {config.training.evaluate_interval_steps}: evaluations use "
            "data.heldout, which is empty; name files there, or leave it out"
        )
    both = set(config.data.heldout) & set(config.data.train)
    if both:
        raise UserError(
            f"data.heldout: {min(both)} is in data.train too, so the draft would be judged by what it was trained on; "
            "keep some conversations apart"
        )
    if config.store.protocol == "rdma" and not config.store.devices:
        raise UserError(
            "store.devices: is empty, and store.protocol: rdma needs them; name them as `ibv_devices` does: mlx5_0, or "
            "set store.protocol: tcp"
        )


def _check_gpus(config: Config) -> None:
    there = visible_gpus()
    ranks, engines, degree = config.training.ranks, config.inference.engines, config.inference.tensor_parallel
    needed = ranks + engines * degree
    if there and needed > there:
        raise UserError(
            f"training.ranks: {ranks} and inference.engines: {engines} of inference.tensor_parallel: {degree} need "
            f"{needed} GPUs, and this machine has {there}" + _advice(there, degree)
        )


def _advice(there: int, degree: int) -> str:
    ranks = there - degree
    if ranks >= 1:
        return f"; try training.ranks: {ranks} and inference.engines: 1"
    return "; use a machine with more, or hide them with CUDA_VISIBLE_DEVICES='' to run on its CPUs"


def _warn_of_store(config: Config, shape: TargetShape) -> list[str]:
    room, _ = store_room(config)
    training = config.training
    tokens = training.packs_per_step * training.tokens_per_pack
    most = tokens * BYTES_PER_VALUE * (len(aux_layers(config, shape)) + 1) * shape.hidden
    if most > room:
        return [
            f"store.bytes_per_rank: {config.store.bytes_per_rank} of training.ranks: {training.ranks} hold "
            f"{_size(room)}, and a full step (training.packs_per_step: {training.packs_per_step} of "
            f"training.tokens_per_pack: {training.tokens_per_pack}) is up to {_size(most)}; if one is too large, the "
            "run ends once the corpus is prepared"
        ]
    return []


def _warn_of_memory(config: Config) -> list[str]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if config.training.ranks * config.store.bytes_per_rank <= memory:
        return []
    return [
        f"store.bytes_per_rank: {config.store.bytes_per_rank} of training.ranks: {config.training.ranks} are more than "
        f"this machine's memory of {_size(memory)}"
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
        f"training.warmup_steps: {config.training.warmup_steps}: the run has only {steps} steps, so it never gets to "
        f"training.learning_rate: {config.training.learning_rate}; try {steps // 10}"
    ]


def store_room(config: Config) -> tuple[int, int]:
    """Bytes that can be planned to be in the store at once, and in one rank's part of it."""
    from specbatch.transfer.store import usable_bytes

    segment = usable_bytes(config.store.bytes_per_rank)
    return config.training.ranks * segment, segment


def _enough(config: Config, needed: int) -> Bytes:
    """`store.bytes_per_rank` for so many bytes on a rank, in whole MiB."""
    _, segment = store_room(config)
    mebibytes = needed * config.store.bytes_per_rank / segment / (1 << 20)
    return Bytes((int(mebibytes) + 1) << 20)


def _size(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"
