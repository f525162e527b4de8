"""The configuration of a run: one documented dataclass a section. A field's text is its ``--help``.

What SGLang and Slurm call something keeps its name here and passes through (``inference.sglang``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Run:
    """The run as a whole."""

    dir: str
    """The run directory; created if missing, and the only place that the run writes to."""
    name: str | None = None
    """For people; the run directory's last part if not given."""
    seed: int = 0
    """Of the order of samples and the draft's first weights."""
    log_interval_s: float = 10.0
    """Seconds between two lines about progress in the log file."""
    stall_timeout_s: float = 900.0
    """Seconds without any progress after which the run is ended, saying who waits for whom."""


@dataclass
class Target:
    """The target model."""

    path: str
    """A Hugging Face directory, or a hub name that is already in this machine's cache."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the engine computes in; auto: as the checkpoint says."""
    trust_remote_code: bool = False
    """Let the target's directory bring its own Python code, to the engine and to the tokenizer alike."""


@dataclass
class Data:
    """Conversations, and what becomes of them."""

    train: list[str]
    """Files (JSONL, JSON, Parquet, also compressed), directories of such, or names that `datasets` loads."""
    heldout: list[str] = field(default_factory=list)
    """The same, never trained on: prompts for the evaluation."""
    format: Literal["auto", "messages", "conversations", "text"] = "auto"
    """OpenAI `messages`, ShareGPT `conversations` or plain `text`; auto: by the keys of each row."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that the draft learns to propose: of all assistant turns, of the last one, or every token."""
    split_turns: bool = False
    """One sample for each assistant turn, with the history that the chat template gives it there: for
    targets whose template rewrites earlier turns, as thinking models' do."""
    max_tokens: int = 4096
    """Longest sample, in tokens."""
    overlong: Literal["truncate", "skip"] = "truncate"
    """What to do with longer ones."""
    max_bad_fraction: float = 0.05
    """Share of rows that may be unusable before the preparation ends with an error."""
    workers: int | None = None
    """Processes that prepare; all cores if not given. The result does not depend on it."""
    cache_dir: str | None = None
    """Where prepared data are kept; specbatch in the user's cache directory if not given."""


@dataclass
class Draft:
    """The draft model and its algorithm."""

    algorithm: Literal["eagle3"] = "eagle3"
    """EAGLE-3 (arXiv:2503.01840)."""
    ttt_steps: int = 7
    """Unrolled steps of training-time test."""
    step_decay: float = 0.8
    """Weight of each unrolled step's loss, as a factor on the one before."""
    vocab_size: int | None = 32000
    """Rows of the draft's head: the most frequent loss tokens of the corpus; null: the target's vocabulary."""
    aux_layers: list[int] | None = None
    """Decoder layers whose outputs the draft reads, from 0; not given: a low, a middle and a high one."""
    intermediate_size: int | None = None
    """Width of the draft's MLP; the target's if not given."""


@dataclass
class Training:
    """The optimizer's steps and the ranks that make them."""

    ranks: int = 1
    """Trainer processes; each has one GPU where there are any."""
    threads: int | None = None
    """CPU threads of a rank; torch's own choice if not given."""
    tokens_per_pack: int = 4096
    """Most tokens of a pack; at least `data.max_tokens`."""
    packs_per_step: int = 8
    """Packs of an optimizer step, over all ranks."""
    epochs: int = 1
    """Passes over the corpus."""
    max_steps: int | None = None
    """End after so many steps, before the plan does."""
    learning_rate: float = 1e-4
    """Highest learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises."""
    min_learning_rate: float = 0.0
    """What it falls to, as a share of `learning_rate`."""
    weight_decay: float = 0.0
    """AdamW's, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the draft computes in; its weights, gradients and optimizer states are float32 in any case."""
    prefetch_steps: int = 2
    """Steps whose packs are fetched ahead."""
    max_restarts: int = 3
    """How often the ranks may be restarted without a step of progress."""


@dataclass
class Inference:
    """The engines that compute the target's hidden states."""

    engines: int = 1
    """SGLang instances."""
    tensor_parallel: int = 1
    """GPUs that one engine is spread over."""
    threads: int | None = None
    """CPU threads of an engine on a machine without GPU; torch's own choice if not given."""
    packs_in_flight: int = 2
    """Packs that an engine works on at once."""
    deterministic: bool = False
    """What is captured depends on the pack alone, to the last bit: no chunked prefill."""
    heartbeat_s: float = 5.0
    """Seconds between signs of life; an engine silent for four times as long loses its claims."""
    start_timeout_s: float = 900.0
    """Seconds that an engine may take to load the target."""
    max_restarts: int = 3
    """How often an engine may be restarted without having computed a pack."""
    sglang: dict[str, Any] = field(default_factory=dict)
    """Further arguments of SGLang, by SGLang's names."""


@dataclass
class Store:
    """Mooncake, which carries the hidden states."""

    protocol: Literal["tcp", "rdma"] = "tcp"
    """How they travel."""
    devices: str = ""
    """RDMA devices, as Mooncake names them: `mlx5_0,mlx5_1`. Required for rdma."""
    bytes_per_rank: int = 4 << 30
    """Host memory that each trainer rank lends the store."""


@dataclass
class Snapshot:
    """Checkpoints from which a run goes on."""

    interval_steps: int = 100
    """Steps between two snapshots."""
    keep: int = 2
    """How many are kept."""


@dataclass
class Evaluate:
    """The measurement at the end: real speculative decoding on held-out prompts."""

    prompts: int = 40
    """How many; 0: none."""
    max_new_tokens: int = 64
    """Longest answer."""
    draft_tokens: int = 3
    """Tokens that the draft proposes before the target verifies them."""
    batch_size: int = 16
    """Prompts decoded at once."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What target and draft compute in; auto: as `target.dtype`, and float32 on a CPU."""


@dataclass
class Slurm:
    """The heterogeneous job. It has no settings yet: `run` starts all components on this machine."""


@dataclass
class Config:
    """Everything that a run is made from."""

    run: Run
    target: Target
    data: Data
    draft: Draft = field(default_factory=Draft)
    training: Training = field(default_factory=Training)
    inference: Inference = field(default_factory=Inference)
    store: Store = field(default_factory=Store)
    snapshot: Snapshot = field(default_factory=Snapshot)
    evaluate: Evaluate = field(default_factory=Evaluate)
    slurm: Slurm = field(default_factory=Slurm)
