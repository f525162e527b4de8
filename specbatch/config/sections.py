"""The configuration of a run: one documented dataclass for each section. A field's docstring is its ``--help``.

Options of SGLang and Slurm keep their names and pass through (``inference.sglang``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from specbatch.config.answers import Regenerate
from specbatch.config.rules import NOT_EMPTY, ONE_LINE, Bytes, Interval, above, at_least, at_most
from specbatch.config.types import Beta, Count, Natural, PathText, Seconds, Share

_SMALLEST_SEGMENT = Bytes(16 << 20)
_FOUR_GIB = Bytes(4 << 30)
_LONGEST_LOG = Bytes(64 << 20)
_AUTO = Interval("auto")


@dataclass
class Run:
    """The run as a whole."""

    dir: PathText
    """The run directory. It is created if missing; the run writes nowhere else."""
    name: Annotated[str, ONE_LINE] = ""
    """Name that is shown to people; if empty, the last part of `run.dir`."""
    seed: Natural = 0
    """Seed of the order of samples, of the draft's first weights and of sampled answers."""
    goal: Literal["draft", "answers"] = "draft"
    """Result of the run: a draft, or only the target's answers to the prompts of `data.train`, as in
    `specbatch regenerate`."""
    log_interval_s: Seconds = 10.0
    """Seconds between two lines about progress in the log file."""
    stall_timeout_s: Seconds = 900.0
    """Seconds without any progress after which the attempt is ended, with a message that says what waits for what."""
    idle_alarm_s: Seconds = 600.0
    """The status reports idle ranks or engines once they have waited most of the time for this many seconds; so do
    ``run.log``, and a mail under Slurm where `slurm.extra` asks for mail."""
    log_limit: Bytes = _LONGEST_LOG
    """Size of a component's log beyond which its older half is dropped."""
    max_restarts: Natural = 3
    """How many attempts in a row the run may begin by itself without a newly trained step, after its head or store died
    or it made no progress."""


@dataclass
class Target:
    """The target model."""

    path: PathText
    """A Hugging Face directory, or a hub name that is already in this machine's cache."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type that the engine computes in. auto: the checkpoint's, but float32 on a CPU without instructions for
    bfloat16."""
    trust_remote_code: bool = False
    """Run Python code from the target's directory, in the engine and in the tokenizer."""


@dataclass
class Data:
    """The conversations, and how they become samples."""

    train: Annotated[list[PathText], NOT_EMPTY]
    """Files (JSONL, JSON, Parquet, also compressed), directories of such, or names that `datasets` loads:
    `owner/name`, `owner/name:split`, `owner/name/subset:split`. An entry may have a weight:
    `[{path: a.jsonl, weight: 2}, b.jsonl]`."""
    weights: list[Annotated[float, above(0)]] = field(default_factory=list)
    """How often each entry of `data.train` is trained per epoch: 2 is twice, 0.5 is every second epoch. One number for
    each entry; if empty, each is trained once."""
    heldout: list[PathText] = field(default_factory=list)
    """Files or names as in `data.train` that are never trained on: prompts and conversations for evaluations."""
    format: Literal["auto", "messages", "conversations", "chosen", "tokens", "pairs", "text"] = "auto"
    """Form of a row: OpenAI `messages`, ShareGPT `conversations`, the `chosen` of preference pairs, rows tokenised
    before (`input_ids` and a mask), pairs of prompt and answer, or plain `text`. auto: the first of these that is not
    empty."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns in the files, where they differ from the usual ones: `{messages: conversation}`. Keys are
    messages, conversations, chosen, input_ids, loss_mask, prompt, answer, text, system and tools."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that the draft learns to propose: those of all assistant turns, those of the last one, or all tokens."""
    split_turns: bool = False
    """Make one sample for each assistant turn, with the history as the chat template renders it there. For targets
    whose template rewrites earlier turns, as those of thinking models do."""
    template_variables: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, by its own names: `enable_thinking: false`, `reasoning_effort: high`,
    `date: 2026-01-31`. `tools` applies to conversations that have none."""
    max_tokens: Annotated[int, at_least(3)] = 4096
    """Tokens of the longest sample. The first two tokens of a sample are never learnt."""
    overlong: Literal["truncate", "skip"] = "truncate"
    """What to do with samples longer than `data.max_tokens`."""
    images: bool = False
    """Also take conversations with images: parts of a user's content that name a file, relative to the file with the
    conversation, or that are a data URL. Only for some targets; rows with images are refused otherwise. Samples with
    images are never cut: longer ones than `data.max_tokens` are skipped."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Whether to train samples that repeat an earlier one, token for token. They are counted in any case."""
    transform: str = ""
    """Your function that gets each row first, as an object, and returns the row to use or None to leave it out:
    `module:function` or `file.py:function`."""
    max_bad_fraction: Share = 0.05
    """Share of unusable rows above which the preparation ends with an error."""
    workers: Count | None = None
    """Processes that prepare the data; as many as there are cores if not given. The result does not depend on it."""
    cache_dir: PathText | None = None
    """Directory of prepared data; `specbatch` in your cache directory if not given."""
    regenerate: Regenerate = field(default_factory=Regenerate)
    """Answers of the target instead of the data's own."""


@dataclass
class Draft:
    """The draft model and its algorithm."""

    algorithm: str = ""
    """Name of the algorithm. It determines which fields this section has."""
    init_from: PathText | None = None
    """Draft for the same target to start from: a directory that `specbatch export` wrote, or a published checkpoint of
    the same algorithm. Not given: random weights."""
    aux_layers: list[Natural] | None = None
    """Decoder layers of the target whose outputs the draft reads, counted from 0. Not given: those that the algorithm's
    authors read."""


@dataclass
class Training:
    """The optimizer's steps and the ranks that make them."""

    ranks: Count = 1
    """Trainer processes. Each has one GPU, if the machine has any."""
    gpu: Annotated[str, ONE_LINE] = ""
    """Kind of the trainers' GPUs, for example `h100`, for the estimates of `specbatch plan` and the memory check."""
    gpu_memory: Bytes | None = None
    """Memory of a trainer's GPU, for example `80GiB`, which is compared with the needs of training before anything
    is started. If not given, that of `training.gpu`."""
    threads: Count | None = None
    """CPU threads of a rank. If not given, torch chooses."""
    tokens_per_pack: Count = 4096
    """Most tokens of a pack; not less than `data.max_tokens`."""
    context_parallel: Count = 1
    """Ranks that train each pack together, for samples that are too long for one GPU. They exchange the keys and values
    of the first unrolled step, and nothing else. Each still needs host memory for whole packs."""
    columns_at_once: Count | None = None
    """Live columns (positions that enter the loss) whose activations are in memory at the same time. Not given: 1024 on
    a CPU, 256 slots there for block drafts, and 2048 on a GPU. The result does not depend on it, except for
    rounding."""
    recompute: Literal["none", "all_but_attention", "all"] = "none"
    """Which activations of the unrolled steps are computed again in the backward pass instead of being kept. It saves
    memory and costs up to a quarter more time."""
    packs_per_step: Count = 8
    """Packs of an optimizer step, over all ranks."""
    epochs: Count = 1
    """Passes over the corpus."""
    max_steps: Count | None = None
    """Steps after which the training ends, if the plan has more."""
    learning_rate: Annotated[float, above(0)] = 1e-4
    """Highest learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """How the learning rate falls after the warm-up. wsd (arXiv:2404.06395): linearly, at the end only."""
    decay_share: Annotated[float, above(0), at_most(1)] = 0.1
    """Share of all steps, at the end, over which the schedule wsd falls."""
    warmup_steps: Natural = 50
    """Steps over which the learning rate rises."""
    min_learning_rate: Share = 0.0
    """Lowest learning rate at the end, as a share of `learning_rate`."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """Weight decay of AdamW, on matrices only."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Betas of AdamW."""
    max_grad_norm: Annotated[float, above(0)] = 0.5
    """Norm to which larger gradients are scaled down."""
    not_finite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or a gradient is NaN or infinite: stop the run and name the samples, or skip the update of
    this step, which costs one more message between ranks in each step."""
    evaluate_interval_steps: Count | None = None
    """Steps between two evaluations on packs of `data.heldout`, which the engines compute first. Not given: no
    evaluations."""
    evaluate_packs: Count = 16
    """Most packs of an evaluation. Each rank keeps its share in host memory, and all must fit into the store
    together with the first step."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type that the draft computes in. Its weights, gradients and optimizer states are always float32."""
    metrics: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Trackers that show the steps, besides `metrics.jsonl`. Weights & Biases stays offline unless WANDB_MODE says
    otherwise, and `specbatch status` names the command that sends the run."""
    prefetch_steps: Count = 2
    """Steps whose packs are fetched ahead."""
    max_restarts: Natural = 3
    """How many times in a row the ranks may be restarted without a newly trained step."""


@dataclass
class Inference:
    """The engines that compute the target's hidden states."""

    engines: Count = 1
    """SGLang instances."""
    tensor_parallel: Count = 1
    """GPUs that one engine is spread over."""
    nodes_per_engine: Count | None = None
    """Nodes of a Slurm job that one engine is spread over, with an even share of its GPUs on each. Not given: as many
    as `tensor_parallel` GPUs need. On CPUs its ranks are shared in the same way."""
    gpu: Annotated[str, ONE_LINE] = ""
    """Kind of the engines' GPUs, for example `h100`: for the estimates of `specbatch plan`, and `specbatch submit` asks
    SGLang whether it would start on it."""
    threads: Count | None = None
    """CPU threads of an engine on a machine without GPU. If not given, torch chooses."""
    packs_in_flight: Count | None = None
    """Packs that an engine works on at the same time; as many as its speed needs if not given."""
    deterministic: bool = False
    """Make hidden states depend only on the pack, to the last bit: without chunked prefill and, on GPUs, with SGLang's
    deterministic inference, whose kernels are slower."""
    heartbeat_s: Seconds = 5.0
    """Seconds between two heartbeats. An engine that is silent for four times as long loses its claims."""
    start_timeout_s: Seconds | None = None
    """Seconds that an engine may take to load the target. Not given: 900, and one more for each 256 MiB of its
    weights."""
    max_restarts: Natural = 3
    """How many times in a row an engine may be restarted without having computed a pack."""
    sglang: dict[str, Any] = field(default_factory=dict)
    """Further arguments of SGLang, under SGLang's names."""


@dataclass
class Store:
    """Mooncake, which carries the hidden states."""

    protocol: Literal["tcp", "rdma"] = "tcp"
    """Protocol of the transfer."""
    devices: str = ""
    """RDMA devices, as `ibv_devices` names them: `mlx5_0,mlx5_1`. Required for rdma."""
    bytes_per_rank: Annotated[Bytes, at_least(_SMALLEST_SEGMENT)] = _FOUR_GIB
    """Host memory that each trainer rank lends to the store."""


@dataclass
class Snapshot:
    """Checkpoints from which a run continues."""

    interval: Interval = _AUTO
    """Interval between two snapshots: steps, such as 100; a time, such as 10min; or auto, the interval that costs
    least, given how long a snapshot takes and how often the run failed. Unless it is a number of steps, the draft that
    an evaluation finds best is kept as well."""
    record: Natural = 0
    """How many of the last steps are recorded as they were trained, with all hidden states, for `specbatch replay`."""
    keep: Annotated[int, at_least(2)] = 2
    """How many of the last snapshots are kept, in addition to the one that evaluations found best. The second last is
    used if the last is damaged."""


@dataclass
class Sweep:
    """Acceptance and speed over several settings, measured with the rest if any of them is given."""

    batch_sizes: list[Count] = field(default_factory=list)
    """Numbers of requests that are decoded at once, such as [1, 8, 64]; `evaluate.batch_size` if empty."""
    draft_tokens: list[Count] = field(default_factory=list)
    """Numbers of tokens that the draft proposes at a time, such as [1, 3, 5], each in a separate engine;
    `evaluate.draft_tokens` if empty."""


@dataclass
class Evaluate:
    """The measurement at the end: real speculative decoding on held-out prompts."""

    prompts: Natural = 40
    """How many held-out prompts are decoded; 0: no measurement."""
    max_new_tokens: Count = 64
    """Tokens of the longest answer."""
    draft_tokens: Count = 3
    """Tokens that the draft proposes at a time, before the target verifies them."""
    batch_size: Count = 16
    """Prompts that are decoded at the same time."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type that target and draft compute in. auto: `target.dtype`, but float32 on a CPU."""
    sets: dict[str, str] = field(default_factory=dict)
    """Additional benchmarks, `evaluate.prompts` prompts of each: files of MT-Bench, GSM8K or HumanEval in their
    published JSONL form, by names of your choice: `{gsm8k: test.jsonl}`."""
    sweep: Sweep = field(default_factory=Sweep)
    """Settings that are compared."""


@dataclass
class SlurmComponent:
    """What one component of the job requests, and how its programs are started on its nodes."""

    partition: Annotated[str, ONE_LINE] = ""
    """Partition of the component; `slurm.partition` if empty."""
    nodes: Count = 1
    """Number of nodes. Components never share a node."""
    gpus_per_node: Natural = 0
    """GPUs of each node."""
    cpus_per_task: Count | None = None
    """CPUs of each task: the head, an engine, or all trainer ranks of a node. If not given, tasks with GPUs get an even
    share of the node."""
    devices: Annotated[str, ONE_LINE] = ""
    """RDMA devices of these nodes, if their names differ from `store.devices`."""
    mem: Annotated[str, ONE_LINE] = ""
    """Memory of each node, in Slurm's format: `64G`, or `0` for all of it. If empty, the partition's default."""
    constraint: Annotated[str, ONE_LINE] = ""
    """Features that the nodes must have."""
    setup: list[Annotated[str, ONE_LINE]] = field(default_factory=list)
    """Lines of bash that run before the program on each node: modules to load, variables to set. The check of the node
    before the components start runs them as well."""
    launch: Annotated[str, ONE_LINE] = ""
    """Command prefix in bash for the program: a container, such as `apptainer exec --nv engine.sif`, that passes on the
    environment and mounts run directory, target and data under their own names."""
    python: Annotated[str, ONE_LINE] = ""
    """Python interpreter with specbatch installed; if empty, the one that submits. Required with `launch`: the
    container's own."""
    srun: list[Annotated[str, ONE_LINE]] = field(default_factory=list)
    """Further options of srun: `--container-image=...`."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further directives of this component, under sbatch's names; `null` removes one."""


@dataclass
class Slurm:
    """The job: one heterogeneous job of head, inference and training."""

    profile: Annotated[str, ONE_LINE] = ""
    """Site profile: the name of a file in `slurm/profiles`, or a path. Values in the configuration take precedence."""
    layout: Literal["het", "single"] = "het"
    """One heterogeneous job, or a single homogeneous allocation for sites that allow no heterogeneous jobs."""
    head_on: Literal["own", "training"] = "own"
    """Whether the head has a node of its own or, for sites without CPU nodes, runs on the first training node."""
    recovery: Literal["chain", "requeue", "none"] = "chain"
    """How a run continues after its job ended early: by a successor job that is queued from the start (chain), by the
    same job, requeued, or by you, with `specbatch resume` (none), for queues in which jobs may not submit others."""
    account: Annotated[str, ONE_LINE] = ""
    """Account that is charged; your default one if empty."""
    partition: Annotated[str, ONE_LINE] = ""
    """Partition of components that name none; the cluster's default if empty."""
    qos: Annotated[str, ONE_LINE] = ""
    """Quality of service (QOS); the default one if empty."""
    time: Annotated[str, ONE_LINE] = "12:00:00"
    """Time limit of one job, in Slurm's format. A run may take several jobs."""
    signal_s: Count = 120
    """Seconds before the time limit at which the run starts to stop with a snapshot. Slurm may be a minute early."""
    gpus: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are requested: `--gpus-per-node`, `--gres=gpu:`, or not at all, if nodes are allocated as a whole."""
    whole_nodes: bool = False
    """Whether whole nodes are charged, whatever is requested, so that engines of `specbatch scale` fill their nodes."""
    cpus_per_gpu: Count | None = None
    """CPUs of a task for each of its GPUs, for components without `cpus_per_task`. If not given, what the partition's
    nodes have for each GPU."""
    stage_target: Annotated[str, ONE_LINE] = ""
    """Directory of the engines' nodes into which the target is copied once a node, before its engines start: a local
    disk, as `$TMPDIR`, or `/dev/shm`, which takes memory of the job. If empty, each engine reads `target.path`."""
    gpu_tflops: Annotated[float, above(0)] | None = None
    """TFLOP/s of one of the cluster's GPUs in dense bfloat16, for `specbatch plan`. Meant for profiles."""
    charge: Annotated[float, above(0)] = 1.0
    """Charge of the site for an hour of a node, in its own unit. Meant for profiles."""
    interface: Annotated[str, ONE_LINE] = ""
    """Network interface whose address the components use, for example `hsn0`; if empty, that of the node's name. NCCL
    and gloo use it, too, unless NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME are set."""
    ports: Annotated[str, ONE_LINE] = ""
    """Range of ports that components listen on, for example `20000-20999`, for sites that open only some between nodes;
    any if empty. gloo and NCCL choose their own."""
    required: list[str] = field(default_factory=list)
    """Fields that must not be empty, for example `slurm.account`. Meant for profiles."""
    forbidden: dict[str, Any] = field(default_factory=dict)
    """Directives that the site refuses, under sbatch's names, and why. `{qos: {debug: why}}` forbids one value. Meant
    for profiles."""
    shared_dirs: list[PathText] = field(default_factory=list)
    """Directories that all nodes share although they look local on this host, for example `/tmp` if it is shared."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further directives of every component, under sbatch's names; `null` removes one."""
    head: SlurmComponent = field(default_factory=SlurmComponent)
    """The head: Mooncake's master and the dispatcher. It needs no GPU and little memory."""
    inference: SlurmComponent = field(default_factory=SlurmComponent)
    """The engines."""
    training: SlurmComponent = field(default_factory=SlurmComponent)
    """The trainer ranks."""


def _usual_draft() -> Draft:
    """Return the ``draft`` section of the default algorithm."""
    from specbatch.config.algorithms import default_algorithm, draft_section

    return draft_section(default_algorithm())()


@dataclass
class Config:
    """Everything that a run is made from."""

    run: Run
    target: Target
    data: Data
    draft: Draft = field(default_factory=_usual_draft)
    training: Training = field(default_factory=Training)
    inference: Inference = field(default_factory=Inference)
    store: Store = field(default_factory=Store)
    snapshot: Snapshot = field(default_factory=Snapshot)
    evaluate: Evaluate = field(default_factory=Evaluate)
    slurm: Slurm = field(default_factory=Slurm)
