"""The configuration of a run: one documented dataclass a section. A field's text is its ``--help``.

What SGLang and Slurm call something keeps its name here and passes through (``inference.sglang``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from specbatch.config.rules import NOT_EMPTY, ONE_LINE, Bytes, Interval, above, at_least, at_most, below, between

Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
Seconds = Annotated[float, above(0)]
Share = Annotated[float, between(0, 1)]
Beta = Annotated[float, at_least(0), below(1)]
_SMALLEST_SEGMENT = Bytes(16 << 20)
_FOUR_GIB = Bytes(4 << 30)
_AUTO = Interval("auto")
Place = Annotated[str, ONE_LINE, NOT_EMPTY]


@dataclass
class Run:
    """The run as a whole."""

    dir: Place
    """The run directory; created if missing, and the only place that the run writes to."""
    name: Annotated[str, ONE_LINE] = ""
    """For people; the run directory's last part if empty."""
    seed: Natural = 0
    """Of the order of samples and the draft's first weights."""
    log_interval_s: Seconds = 10.0
    """Seconds between two lines about progress in the log file."""
    stall_timeout_s: Seconds = 900.0
    """Seconds without any progress after which the attempt is ended, saying who waits for whom."""
    max_restarts: Natural = 3
    """How often the run may begin a new attempt by itself, after its head or store died or nothing moved, without
    a step of progress."""


@dataclass
class Target:
    """The target model."""

    path: Place
    """A Hugging Face directory, or a hub name that is already in this machine's cache."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the engine computes in; auto: as the checkpoint says."""
    trust_remote_code: bool = False
    """Let the target's directory bring its own Python code, to the engine and to the tokenizer alike."""


@dataclass
class Data:
    """Conversations, and what becomes of them."""

    train: Annotated[list[Place], NOT_EMPTY]
    """Files (JSONL, JSON, Parquet, also compressed), directories of such, or names that `datasets` loads."""
    heldout: list[Place] = field(default_factory=list)
    """The same, never trained on: prompts for the evaluation."""
    format: Literal["auto", "messages", "conversations", "text"] = "auto"
    """OpenAI `messages`, ShareGPT `conversations` or plain `text`; auto: by the keys of each row."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that the draft learns to propose: of all assistant turns, of the last one, or every token."""
    split_turns: bool = False
    """One sample for each assistant turn, with the history that the chat template gives it there: for
    targets whose template rewrites earlier turns, as thinking models' do."""
    max_tokens: Annotated[int, at_least(3)] = 4096
    """Longest sample, in tokens. The first two tokens of a sample teach nothing."""
    overlong: Literal["truncate", "skip"] = "truncate"
    """What to do with longer ones."""
    max_bad_fraction: Share = 0.05
    """Share of rows that may be unusable before the preparation ends with an error."""
    workers: Count | None = None
    """Processes that prepare; all cores if not given. The result does not depend on it."""
    cache_dir: Place | None = None
    """Where prepared data are kept; specbatch in the user's cache directory if not given."""


@dataclass
class Draft:
    """The draft model and its algorithm."""

    algorithm: Literal["eagle3"] = "eagle3"
    """EAGLE-3 (arXiv:2503.01840)."""
    init_from: Place | None = None
    """Start from this draft for the same target: a directory that `export` wrote, or a published EAGLE-3 checkpoint."""
    ttt_steps: Count = 7
    """Unrolled steps of training-time test."""
    step_decay: Annotated[float, above(0), at_most(1)] = 0.8
    """Weight of each unrolled step's loss, as a factor on the one before."""
    vocab_size: Count | None = 32000
    """Rows of the draft's head: the most frequent loss tokens of the corpus; null: the target's vocabulary."""
    aux_layers: list[Natural] | None = None
    """Decoder layers whose outputs the draft reads, from 0; not given: a low, a middle and a high one."""
    intermediate_size: Count | None = None
    """Width of the draft's MLP; the target's if not given."""
    train_head: bool = True
    """Train the head, which starts as the target's; false: keep it, which saves 12 bytes a weight, over all ranks."""
    train_embedding: bool = False
    """Train an embedding of the draft's own, which starts as the target's: 16 bytes a weight more, over all ranks, and
    another matrix of the target's vocabulary to load where the draft is served."""


@dataclass
class Training:
    """The optimizer's steps and the ranks that make them."""

    ranks: Count = 1
    """Trainer processes; each has one GPU where there are any."""
    gpu_memory: Bytes | None = None
    """Memory of a trainer's GPU, as `80GiB` or in bytes: what the training needs is compared with it before anything is
    started; not at all if not given."""
    threads: Count | None = None
    """CPU threads of a rank; torch's own choice if not given."""
    tokens_per_pack: Count = 4096
    """Most tokens of a pack; at least `data.max_tokens`."""
    context_parallel: Count = 1
    """Ranks that train each pack together, for samples that one has no memory for: the first unrolled step's keys and
    values cross them, and nothing else. In host memory each rank still has room for whole packs."""
    columns_at_once: Count | None = None
    """Live columns, the positions of a pack that enter the loss, whose activations are held at once; 512 on a CPU and
    2048 on a GPU if not given. The result does not depend on it, but for rounding."""
    recompute: Literal["none", "all_but_attention", "all"] = "none"
    """What of the unrolled steps is computed again in the backward pass instead of being kept for it; less memory at
    the price of time, a quarter more at most."""
    packs_per_step: Count = 8
    """Packs of an optimizer step, over all ranks."""
    epochs: Count = 1
    """Passes over the corpus."""
    max_steps: Count | None = None
    """End after so many steps, before the plan does."""
    learning_rate: Annotated[float, above(0)] = 1e-4
    """Highest learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """How the learning rate falls after the warm-up; wsd (arXiv:2404.06395): linearly, and only at the end."""
    decay_share: Annotated[float, above(0), at_most(1)] = 0.1
    """Share of all steps, at the end, over which wsd falls."""
    warmup_steps: Natural = 50
    """Steps over which the learning rate rises."""
    min_learning_rate: Share = 0.0
    """What it falls to, as a share of `learning_rate`."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """AdamW's, on matrices only."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's."""
    max_grad_norm: Annotated[float, above(0)] = 0.5
    """Gradients are scaled down to this norm."""
    not_finite: Literal["stop", "skip"] = "stop"
    """What a loss or a gradient does that is NaN or infinite: stop the run, naming the samples, or skip the step's
    update, which costs one more message between ranks at each step."""
    evaluate_interval_steps: Count | None = None
    """Steps between two evaluations on packs of `data.heldout`, which the engines compute first; not given: none."""
    evaluate_packs: Count = 16
    """How many, at most; each rank keeps its share in host memory, and all fit into the store with the first step."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the draft computes in; its weights, gradients and optimizer states are float32 in any case."""
    prefetch_steps: Count = 2
    """Steps whose packs are fetched ahead."""
    max_restarts: Natural = 3
    """How often the ranks may be restarted without a step of progress."""


@dataclass
class Inference:
    """The engines that compute the target's hidden states."""

    engines: Count = 1
    """SGLang instances."""
    tensor_parallel: Count = 1
    """GPUs that one engine is spread over."""
    threads: Count | None = None
    """CPU threads of an engine on a machine without GPU; torch's own choice if not given."""
    packs_in_flight: Count = 2
    """Packs that an engine works on at once."""
    deterministic: bool = False
    """What is captured depends on the pack alone, to the last bit: no chunked prefill."""
    heartbeat_s: Seconds = 5.0
    """Seconds between signs of life; an engine silent for four times as long loses its claims."""
    start_timeout_s: Seconds = 900.0
    """Seconds that an engine may take to load the target."""
    max_restarts: Natural = 3
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
    bytes_per_rank: Annotated[Bytes, at_least(_SMALLEST_SEGMENT)] = _FOUR_GIB
    """Host memory that each trainer rank lends the store, as `4GiB` or in bytes."""


@dataclass
class Snapshot:
    """Checkpoints from which a run goes on."""

    interval: Interval = _AUTO
    """Between two snapshots: steps, as 100; a time, as 10min; auto: what costs least, by what a snapshot takes and
    how often the run failed. Where it is no number of steps, an evaluation that finds the best draft is kept, too."""
    record: Natural = 0
    """How many steps are kept as they were trained, with all hidden states, for `specbatch replay`; 0: none."""
    keep: Annotated[int, at_least(2)] = 2
    """How many are kept, and the one that evaluations found best; the one before the last is the way back from a
    damaged disk."""


@dataclass
class Evaluate:
    """The measurement at the end: real speculative decoding on held-out prompts."""

    prompts: Natural = 40
    """How many; 0: none."""
    max_new_tokens: Count = 64
    """Longest answer."""
    draft_tokens: Count = 3
    """Tokens that the draft proposes before the target verifies them."""
    batch_size: Count = 16
    """Prompts decoded at once."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What target and draft compute in; auto: as `target.dtype`, and float32 on a CPU."""


@dataclass
class SlurmComponent:
    """What one component of the job asks for, and how its programs are started on its nodes."""

    partition: Annotated[str, ONE_LINE] = ""
    """Its partition; `slurm.partition` if empty."""
    nodes: Count = 1
    """Its nodes; components never share one."""
    gpus_per_node: Natural = 0
    """GPUs of each node."""
    cpus_per_task: Count | None = None
    """CPUs of each of its tasks: the head, an engine, or all trainer ranks of a node."""
    mem: Annotated[str, ONE_LINE] = ""
    """Memory of each node, as Slurm writes it: `64G`; `0`: all of it. The partition's default if empty."""
    constraint: Annotated[str, ONE_LINE] = ""
    """Features that its nodes must have."""
    setup: list[Annotated[str, ONE_LINE]] = field(default_factory=list)
    """Lines of bash before its program, on each of its nodes: modules to load, variables to set."""
    launch: Annotated[str, ONE_LINE] = ""
    """Words of bash before its program's name: a container, as `apptainer exec --nv engine.sif`."""
    python: Annotated[str, ONE_LINE] = ""
    """Its Python, with specbatch in it; the one that submits if empty."""
    srun: list[Annotated[str, ONE_LINE]] = field(default_factory=list)
    """Further options of its srun: `--container-image=...`."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Its further directives, by sbatch's names; null takes one away."""


@dataclass
class Slurm:
    """The job: one heterogeneous job of head, inference and training."""

    profile: Annotated[str, ONE_LINE] = ""
    """What is particular to a cluster: the name of a file in `slurm/profiles`, or a path. What the configuration says
    comes first."""
    layout: Literal["het", "single"] = "het"
    """One heterogeneous job, or one homogeneous allocation for sites that allow no heterogeneous jobs."""
    head_on: Literal["own", "training"] = "own"
    """Whether the head has a node of its own, or runs on the first training node: for sites without CPU nodes."""
    recovery: Literal["chain", "requeue"] = "chain"
    """Who brings a run back: a successor that Slurm starts when the job ends early, or the job itself, requeued."""
    account: Annotated[str, ONE_LINE] = ""
    """The account that pays; your default one if empty."""
    partition: Annotated[str, ONE_LINE] = ""
    """Of all components that name none; the cluster's default if empty."""
    qos: Annotated[str, ONE_LINE] = ""
    """Quality of service; the default one if empty."""
    time: Annotated[str, ONE_LINE] = "12:00:00"
    """Time limit of one attempt, as Slurm writes it."""
    signal_s: Count = 120
    """Seconds before the time limit at which the run is asked to stop with a snapshot. Slurm may be a minute early."""
    gpus: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for: `--gpus-per-node`, `--gres=gpu:`, or not at all, where nodes are whole."""
    interface: Annotated[str, ONE_LINE] = ""
    """Network interface whose address the components use, as `hsn0`; that of the node's name if empty."""
    required: list[str] = field(default_factory=list)
    """Fields that must not be empty, as `slurm.account`: for profiles."""
    forbidden: dict[str, Any] = field(default_factory=dict)
    """Directives that the site does not take, by sbatch's names, and why: for profiles."""
    shared_dirs: list[Place] = field(default_factory=list)
    """Directories that all nodes share, though on this host they look like its own: `/tmp` where it is none."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further directives of every component, by sbatch's names; null takes one away."""
    head: SlurmComponent = field(default_factory=SlurmComponent)
    """Mooncake's master and the dispatcher: no GPU, little memory."""
    inference: SlurmComponent = field(default_factory=SlurmComponent)
    """The engines."""
    training: SlurmComponent = field(default_factory=SlurmComponent)
    """The trainer ranks."""


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
