"""Writes a configuration to start from as a file for people to read and change, with a comment for each key."""

from __future__ import annotations

from typing import Any

import yaml

from specbatch.initial import EPOCH_TOKENS, Initial
from specbatch.planning.text import duration
from specbatch.target import brings_code

_COLUMN = 38
_COMMENTS = {
    "run.dir": "for everything that the run writes; on a file system that all nodes share",
    "target.path": "a directory, or a hub name that `hf download` has put into the cache",
    "target.trust_remote_code": "the target has its own Python code: read it, then set true",
    "data.train": "conversations with the target's own answers: see `specbatch regenerate`",
    "data.heldout": "other conversations, for evaluations; never trained on",
    "data.max_tokens": "longest sample",
    "data.loss_on": "the draft proposes answers, not questions",
    "training.ranks": "one per GPU of the training nodes",
    "training.gpu": "training is checked against its memory",
    "training.tokens_per_pack": "a rank trains one pack at a time",
    "training.packs_per_step": "in each optimizer step, over all ranks",
    "training.epochs": "passes over the conversations",
    "training.learning_rate": "published drafts: 1e-4, 5e-5 for targets of several hundred GiB",
    "training.schedule": "how the learning rate falls",
    "training.warmup_steps": "steps over which it rises first",
    "training.max_grad_norm": "larger gradients are scaled down to this norm",
    "training.recompute": "saves memory, takes a quarter more time",
    "training.evaluate_interval_steps": "evaluation on held-out data; the best draft is kept",
    "inference.engines": "",
    "inference.tensor_parallel": "GPUs per engine: the fewest that can hold the target",
    "inference.gpu": "for the estimates of `plan` and the checks of `submit`",
    "inference.packs_in_flight": "enough that an engine always has work",
    "store.protocol": "",
    "store.devices": "RDMA devices, as `ibv_devices` names them",
    "store.bytes_per_rank": "host memory: holds some steps ahead",
    "evaluate.prompts": "held-out prompts that are decoded with and without the draft at the end",
    "evaluate.draft_tokens": "tokens that the draft proposes at a time",
    "slurm.head": "needs no GPUs",
    "slurm.inference": "mem 0: all memory of a node",
    "slurm.training": "the ranks' nodes",
    "slurm.time": "limit of one attempt; the run continues in the next",
}


def document(found: Initial) -> str:
    """Return YAML that `specbatch.config.load_config` reads."""
    config, nodes, target = found.config, found.nodes, found.target
    total = found.epoch_s
    gpus = nodes.nodes * nodes.gpus
    engines = config.inference.engines
    lines = [
        f"# A draft for {found.name} ({target.architecture}) on {nodes.nodes} "
        f"node{'s' * (nodes.nodes > 1)} of {nodes.gpus} {nodes.gpu.upper()}.",
        f"# {EPOCH_TOKENS / 1e9:g} B tokens, three quarters of them learnt, take {duration(total)} by assumed rates: "
        f"{total * nodes.nodes / 3600:.1f} node-hours,",
        f"# {total * gpus / 3600:.0f} GPU-hours. {engines} engines compute {found.engine_tokens_per_s:,.0f} tokens/s "
        f"each, {config.training.ranks} ranks train {found.trainer_tokens_per_s:,.0f} together.",
        "# All other keys have their defaults; see `specbatch run --help`.",
    ]
    start = "specbatch submit" if nodes.nodes > 1 else "specbatch run"
    lines.append(f"# First check it with `specbatch plan --config FILE`, then start it with `{start} --config FILE`.")
    training, inference, store = config.training, config.inference, config.store
    sections: dict[str, dict[str, Any]] = {
        "run": {"dir": config.run.dir},
        "target": {"path": config.target.path, **({"trust_remote_code": False} if brings_code(target) else {})},
        "data": {
            "train": config.data.train,
            "heldout": config.data.heldout,
            "max_tokens": config.data.max_tokens,
            "loss_on": config.data.loss_on,
        },
        "draft": {name: getattr(config.draft, name) for name in found.draft.comments},
        "training": {
            name: getattr(training, name)
            for name in (
                *("ranks", "gpu", "tokens_per_pack", "packs_per_step", "epochs", "learning_rate", "schedule"),
                *("warmup_steps", "max_grad_norm", "recompute", "evaluate_interval_steps"),
            )
            if (name, getattr(training, name)) != ("recompute", "none")
        },
        "inference": {
            name: getattr(inference, name) for name in ("engines", "tensor_parallel", "gpu", "packs_in_flight")
        },
        "store": {
            "protocol": store.protocol,
            **({"devices": store.devices} if store.devices else {}),
            "bytes_per_rank": str(store.bytes_per_rank),
        },
        "evaluate": {"prompts": config.evaluate.prompts, "draft_tokens": config.evaluate.draft_tokens},
    }
    for name, values in sections.items():
        lines += ["", f"{name}:"]
        lines += [_line(f"{name}.{key}", value, found) for key, value in values.items()]
        if name == "draft":
            lines += [f"  # {reason}" for reason in found.draft.notes]
    if nodes.nodes > 1:
        lines += ["", "slurm:", *_slurm(found)]
    return "\n".join(lines) + "\n"


def _slurm(found: Initial) -> list[str]:
    slurm = found.config.slurm
    lines = [
        _line("slurm.time", slurm.time, found),
        "  # partition: ...   account: ...   as your cluster needs them; or use a profile of slurm/profiles",
    ]
    for name in ("head", "inference", "training"):
        part = getattr(slurm, name)
        values = {"nodes": part.nodes} if name != "head" else {}
        values |= {"gpus_per_node": part.gpus_per_node} if part.gpus_per_node else {}
        values |= {"cpus_per_task": part.cpus_per_task, "mem": part.mem}
        lines.append(_line(f"slurm.{name}", values, found))
    return lines


def _line(key: str, value: Any, found: Initial) -> str:
    config, name = found.config, key.rpartition(".")[2]
    comment = found.draft.comments[name] if key.startswith("draft.") else _COMMENTS[key]
    if key == "inference.engines":
        comment = f"{config.inference.tensor_parallel} GPU{'s' * (config.inference.tensor_parallel > 1)} each"
    if key == "store.protocol":
        comment = "set tcp if there is neither InfiniBand nor RoCE" if value == "rdma" else "within one node"
    return f"{f'  {name}: {_text(value)}':<{_COLUMN}}  # {comment}"


def _text(value: Any) -> str:
    """Return a value as YAML, in one line."""
    if isinstance(value, float):
        return f"{value:.1e}".replace("e-0", "e-") if value < 0.01 else f"{value:g}"
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return text.removesuffix("...\n").strip()
