"""How much faster a draft makes its target: real speculative decoding beside plain decoding, on held-out prompts.

Both are done by SGLang with the same arguments in the same run, greedily, and their outputs are compared token for
token. On a machine without accelerator SGLang drafts through `specbatch.inference.cpu_speculative`; there the
acceptance length is what counts, since drafts cost nearly as much as the tokens that they save.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from specbatch.acceptance import Answers, differences, disagreements, measure
from specbatch.config import Config, Evaluate, load_config
from specbatch.corpus import open_corpus
from specbatch.errors import RunError, UserError
from specbatch.export.card import tell_measured
from specbatch.inference import cpu_speculative
from specbatch.inference.server import RequestRefused, SGLangServer, accelerator_available
from specbatch.rundir import RunDir, write_json
from specbatch.target import TargetShape, read_target
from specbatch.training.drafts import files

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and of how much."""

CPU_NOTE = (
    "on a CPU only the acceptance length counts: drafting and verifying take time there that they do not take on a GPU"
)
METRICS_STEPS = 20
"""Last steps of training whose accuracies are averaged: one step is noisy."""
SPARE_TOKENS = 16
"""SGLang keeps a few positions of the context, and a few slots a request, to itself."""
SERVER_BYTES = 3 << 30
"""Memory of an engine on a CPU besides its weights, with room to spare."""


def evaluate(
    run_dir: RunDir,
    *,
    draft: Path | None = None,
    settings: Evaluate | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a draft and write ``evaluation.json``.

    Args:
        run_dir: of the run whose target, held-out prompts and metrics are used.
        draft: directory of the draft; the run's export if not given.
        settings: the run's ``evaluate`` section if not given.
        progress: told of stages.

    Returns:
        What was written. `summary_line` and `report` put it into words.

    Raises:
        UserError: if there is no draft for this target, or nothing to measure it with.
        RunError: if an engine fails.
    """
    started = time.monotonic()
    config = load_config(run_dir.config)
    settings = settings or config.evaluate
    shape = read_target(config.target.path)
    folder = draft or run_dir.export
    _check_draft(run_dir, folder, shape, given=draft is not None)
    questions, left_out = _questions(run_dir, config, settings, shape)
    servers = _servers(run_dir, config, settings, shape, folder, questions)
    tell = progress or (lambda stage, done, total: None)
    plain, speculative, device = _decode(servers, questions, settings, shape, tell)

    dtype = _dtype(config, settings)
    dtype = shape.dtype if dtype == "auto" else dtype
    accuracy = training_accuracy(run_dir.metrics)
    evaluation = measure(plain, speculative, settings.draft_tokens)
    warnings = [
        *differences(plain, speculative, dtype),
        *disagreements(evaluation["acceptance_rate"], accuracy or [], evaluation["verify_steps"]),
    ]
    if left_out:
        warnings.append(f"{left_out} held-out prompts are too long for the target's context and were left out")
    evaluation |= {
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "dtype": dtype,
        "device": device,
        "seconds": time.monotonic() - started,
        "training_accuracy": accuracy,
        "draft": str(folder),
        "target": str(shape.path),
        "sglang": version("sglang"),
        "note": CPU_NOTE if device == "cpu" else None,
        "warnings": warnings,
    }
    write_json(run_dir.evaluation, evaluation)
    tell_measured(folder, evaluation)
    for warning in warnings:
        logger.warning("evaluation: %s", warning)
    logger.info("evaluated acceptance_length=%.3f seconds=%.1f", evaluation["acceptance_length"], evaluation["seconds"])
    return evaluation


def summary_line(evaluation: dict[str, Any], export: Path) -> str:
    """The result in one line: ``acceptance length 1.93 (plain decoding 1.00), output identical on 40 of 40 prompts,
    draft in runs/quickstart/export``.

    Args:
        export: the draft's directory; shown relative to the current one if it is inside.
    """
    with contextlib.suppress(ValueError):
        export = export.resolve().relative_to(Path.cwd())
    return (
        f"acceptance length {evaluation['acceptance_length']:.2f} (plain decoding 1.00), output identical on "
        f"{evaluation['identical']} of {evaluation['prompts']} prompts, draft in {export}"
    )


def report(evaluation: dict[str, Any]) -> list[str]:
    """The rest of the result, for people: one line for each finding."""
    lines = [f"drafts accepted by position: {_percent(evaluation['acceptance_rate'])}"]
    if evaluation["training_accuracy"]:
        lines.append(
            f"accuracy at the end of training, each position by itself: {_percent(evaluation['training_accuracy'])}"
        )
    lines.append(
        f"tokens/s: {evaluation['tokens_per_s_plain']:.1f} plain, {evaluation['tokens_per_s_speculative']:.1f} "
        f"speculative ({evaluation['device']}, {evaluation['dtype']}, {evaluation['batch_size']} at once)"
    )
    if evaluation["note"]:
        lines.append(f"note: {evaluation['note']}")
    return [*lines, *(f"warning: {warning}" for warning in evaluation["warnings"])]


def training_accuracy(metrics: Path) -> list[float] | None:
    """Accuracy of each unrolled step, averaged over the last `METRICS_STEPS` steps; None if nothing is recorded.

    Args:
        metrics: lines of JSON with ``accuracy``, a list, of which a value may be null where nothing was learnt.
    """
    if not metrics.is_file():
        return None
    rows: list[list[float | None]] = []
    for line in metrics.read_text().splitlines()[-METRICS_STEPS:]:
        # A run that was killed may have left half a line.
        with contextlib.suppress(json.JSONDecodeError, KeyError):
            rows.append(json.loads(line)["accuracy"])
    positions = max(map(len, rows), default=0)
    means = []
    for position in range(positions):
        values = [row[position] for row in rows if position < len(row)]
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known:
            break
        means.append(sum(known) / len(known))
    return means or None


def _percent(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.0%}" for share in shares)


def _check_draft(run_dir: RunDir, folder: Path, shape: TargetShape, *, given: bool) -> None:
    """Refuse what SGLang would load with random tensors, or fail on after minutes."""
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing and given:
        raise UserError(f"{folder} has no {missing[0]}: not the directory of an exported draft")
    if missing:
        raise UserError(f"{run_dir.root} has no exported draft yet: make it with `specbatch export {run_dir.root}`")
    try:
        found = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON: {error}") from error
    width = found.get("target_hidden_size", found.get("hidden_size"))
    if found.get("num_aux_hidden_states") == 1:  # all states as one: a draft with an embedding of its own
        width = found.get("hidden_size")
    for name, has, value in (
        ("vocab_size", found.get("vocab_size"), shape.vocab),
        ("target_hidden_size", width, shape.hidden),
    ):
        if has != value:
            raise UserError(
                f"{folder / 'config.json'}: {name} is {has}, but the target {shape.path} has {value}: it is a draft "
                "for another target"
            )


def _questions(run_dir: RunDir, config: Config, settings: Evaluate, shape: TargetShape) -> tuple[list[list[int]], int]:
    """The prompts, spread evenly over the held-out conversations, and how many of all are too long to use."""
    if settings.prompts < 1:
        raise UserError("evaluate.prompts is 0: nothing to measure")
    heldout = open_corpus(run_dir).heldout
    if heldout is None:
        raise UserError(
            f"{run_dir.config}: data.heldout is empty, and prompts that were trained on tell nothing: give it "
            "conversations that are not in data.train"
        )
    every = heldout.prompts()
    room = shape.max_positions - settings.max_new_tokens - 2 * (settings.draft_tokens + 1) - SPARE_TOKENS
    usable = [prompt for prompt in every if 0 < len(prompt) <= room]
    if not usable:
        raise UserError(
            f"{run_dir.config}: none of the {len(every)} prompts in data.heldout leaves room for "
            f"evaluate.max_new_tokens {settings.max_new_tokens} in the target's context of {shape.max_positions} tokens"
        )
    count = min(settings.prompts, len(usable))
    return [usable[i * len(usable) // count] for i in range(count)], len(every) - len(usable)


def _dtype(config: Config, settings: Evaluate) -> str:
    """What SGLang is told: `auto` where the checkpoint decides."""
    if settings.dtype != "auto":
        return settings.dtype
    return config.target.dtype if accelerator_available() else "float32"


def _servers(
    run_dir: RunDir,
    config: Config,
    settings: Evaluate,
    shape: TargetShape,
    draft: Path,
    questions: Sequence[Sequence[int]],
) -> tuple[SGLangServer, SGLangServer]:
    """One server that decodes plainly and one that drafts, alike in everything else."""
    on_cpu = not accelerator_available()
    arguments = config.inference.sglang | {
        "model_path": shape.path,
        "trust_remote_code": config.target.trust_remote_code,
        "dtype": _dtype(config, settings),
        "tp_size": 1 if on_cpu else config.inference.tensor_parallel,
        "skip_tokenizer_init": True,
        "disable_radix_cache": True,
        "max_running_requests": settings.batch_size,
        # Both are up at once on a CPU, and one has nothing to do while the other is measured.
        "sleep_on_idle": True,
    }
    if on_cpu:
        longest = sorted(map(len, questions))[-settings.batch_size :]
        each = settings.max_new_tokens + 4 * (settings.draft_tokens + 1) + SPARE_TOKENS
        arguments["max_total_tokens"] = sum(longest) + each * len(longest)
    speculation = {
        **files(config.draft.algorithm).SGLANG,
        "speculative_draft_model_path": draft.resolve(),
        "speculative_num_steps": settings.draft_tokens,
        "speculative_num_draft_tokens": settings.draft_tokens + 1,
    }
    attempt = max(run_dir.attempts(), default=0)
    timeout = config.inference.start_timeout_s

    def server(extra: dict[str, Any], task: int) -> SGLangServer:
        log = run_dir.component_log(attempt, "evaluate", task)
        environment = {cpu_speculative.SELECT: "1"} if on_cpu and extra else {}
        return SGLangServer(arguments | extra, log, environment, start_timeout_s=timeout)

    return server({}, 0), server(speculation, 1)


def _decode(
    servers: tuple[SGLangServer, SGLangServer],
    questions: list[list[int]],
    settings: Evaluate,
    shape: TargetShape,
    tell: Progress,
) -> tuple[Answers, Answers, str]:
    """Decode all prompts plainly, then with the draft; the third is the device."""
    answers: list[Answers] = []
    device = ""
    stages = ("plain decoding", "speculative decoding")
    at_once = not accelerator_available() and _memory_for_two(shape)
    for group in [servers] if at_once else [(server,) for server in servers]:
        tell("starting engines", len(answers), len(servers))
        with _running(group):
            for server in group:
                stage = stages[len(answers)]
                tell(stage, 0, len(questions))
                answers.append(_ask(server, questions, settings, shape))
                device = server.get("/server_info")["device"]
                tell(stage, len(questions), len(questions))
    plain, speculative = answers
    if not sum(speculative.histogram):
        raise RunError(
            f"SGLang decoded {speculative.count} tokens without a single verify step; its log: {servers[1].log}"
        )
    return plain, speculative, device


def _memory_for_two(shape: TargetShape) -> bool:
    """Whether two engines fit into this machine's free memory. Starting both at once saves half of the start-up."""
    weights = sum(file.stat().st_size for file in shape.path.glob("*.safetensors"))
    widened = weights if shape.dtype == "float32" else 2 * weights
    return bool(2 * (widened + SERVER_BYTES) < psutil.virtual_memory().available)


@contextlib.contextmanager
def _running(servers: Sequence[SGLangServer]) -> Iterator[None]:
    """Start servers at the same time, and end them together; if one cannot start, none runs."""
    try:
        with ThreadPoolExecutor(len(servers)) as pool:
            starts = [pool.submit(server.start) for server in servers]
            try:
                for start in as_completed(starts):
                    start.result()
            except BaseException:
                # The pool is left when all starts have returned; one whose process is gone gives up.
                _stop(servers)
                raise
        yield
    finally:
        _stop(servers)


def _stop(servers: Sequence[SGLangServer]) -> None:
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(SGLangServer.stop, servers))


def _ask(server: SGLangServer, questions: list[list[int]], settings: Evaluate, shape: TargetShape) -> Answers:
    sampling: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "temperature": 0, "ignore_eos": False}
    if shape.eos:
        sampling["stop_token_ids"] = list(shape.eos)
    try:
        # The first request of a server pays for what is set up once.
        server.generate({"input_ids": questions[:1], "sampling_params": sampling | {"max_new_tokens": 8}})
        started = time.monotonic()
        results = server.generate({"input_ids": questions, "sampling_params": sampling}, timeout_s=3600)
        seconds = time.monotonic() - started
    except RequestRefused as error:
        raise RunError(f"SGLang refused the evaluation's prompts: {error}; its log: {server.log}") from error
    histogram = [0] * (settings.draft_tokens + 1)
    for result in results:
        reason = result["meta_info"]["finish_reason"]
        if reason["type"] not in ("stop", "length"):
            raise RunError(f"SGLang broke off an answer: {reason}; its log: {server.log}")
        for accepted, steps in enumerate(result["meta_info"].get("spec_correct_drafts_histogram", [])):
            histogram[accepted] += steps
    return Answers([result["output_ids"] for result in results], seconds, tuple(histogram))
