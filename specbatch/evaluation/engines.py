"""The engines of a measurement, which differ only in the draft, and the requests to them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from specbatch.config import Config, Evaluate
from specbatch.drafts.base import Algorithm
from specbatch.errors import RunError, UserError
from specbatch.evaluation.differences import Parting
from specbatch.evaluation.statistics import DecodedAnswers
from specbatch.evaluation.transcripts import ANSWERS, MOST_TOKENS, VerifyStep, steps_of
from specbatch.inference import cpu_speculative
from specbatch.inference.arguments import start_timeout_s
from specbatch.inference.nodes import FurtherNodes
from specbatch.inference.server import RequestRefused, SGLangServer, accelerator_available
from specbatch.rundir import read_json
from specbatch.target import TargetShape

SPARE_TOKENS = 16
"""Positions of the context, and slots of each request, that SGLang keeps for itself."""
SERVER_BYTES = 3 << 30
"""Memory of an engine on a CPU besides its weights, with a margin."""
LONGER_CONTEXT = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"
"""Environment variable that lets SGLang serve a draft with a shorter context than the target's."""

Questions = dict[str, list[list[int]]]
"""Token ids of prompts by the name of their set; the first set is that of the main measurement."""


@dataclass(frozen=True)
class Subject:
    """What is measured, and how."""

    config: Config
    settings: Evaluate
    shape: TargetShape
    algorithm: Algorithm
    draft: Path
    logs: Path
    """Folder of the engines' logs."""
    nodes: FurtherNodes | None = None
    """Further nodes of the engine, for a target that is larger than a node."""

    @property
    def batch_sizes(self) -> list[int]:
        """The sweep's values, ascending."""
        return sorted({*self.settings.sweep.batch_sizes}) or [self.settings.batch_size]

    @property
    def draft_tokens(self) -> list[int]:
        """The sweep's values, ascending."""
        return sorted({*self.settings.sweep.draft_tokens}) or [self.settings.draft_tokens]

    @property
    def most_at_once(self) -> int:
        """Largest number of requests that an engine decodes at once."""
        return max(self.settings.batch_size, *self.batch_sizes) if self.sweeps else self.settings.batch_size

    @property
    def most_draft_tokens(self) -> int:
        """Largest number of draft tokens in a verify step."""
        return max(self.settings.draft_tokens, *self.draft_tokens) if self.sweeps else self.settings.draft_tokens

    @property
    def sweeps(self) -> bool:
        """Whether several settings or several sets of prompts are measured."""
        return bool(self.settings.sets or self.settings.sweep.batch_sizes or self.settings.sweep.draft_tokens)

    @property
    def dtype(self) -> str:
        """Data type that SGLang is given: `auto` where the checkpoint decides."""
        if self.settings.dtype != "auto":
            return self.settings.dtype
        return self.config.target.dtype if accelerator_available() else "float32"

    def room(self) -> int:
        """Length of the longest prompt that leaves room for an answer, in tokens."""
        beside = self.settings.max_new_tokens + 2 * (self.most_draft_tokens + 1) + SPARE_TOKENS
        return self.shape.max_positions - beside

    def served(self, engine: str, draft_tokens: int) -> dict[str, Any]:
        """Arguments of an engine that drafts this many tokens at a time.

        Raises:
            UserError: the engine does not serve drafts of this algorithm.
        """
        found = self.algorithm.files.serve(engine, draft_tokens)
        if found is None:
            raise UserError(
                f"draft.algorithm: SGLang does not serve drafts of {self.algorithm.title}; set evaluate.prompts: 0"
            )
        return found


def server_of(subject: Subject, draft_tokens: int, questions: Questions) -> SGLangServer:
    """An engine that drafts this many tokens at a time; one that decodes plainly if they are 0."""
    config, settings = subject.config, subject.settings
    on_cpu = not accelerator_available()
    arguments = config.inference.sglang | {
        "model_path": subject.shape.path,
        "trust_remote_code": config.target.trust_remote_code,
        "dtype": subject.dtype,
        "tp_size": 1 if on_cpu else config.inference.tensor_parallel,
        "skip_tokenizer_init": True,
        "disable_radix_cache": True,
        "max_running_requests": subject.most_at_once,
        # On a CPU both engines run at the same time, and one is idle while the other is measured.
        "sleep_on_idle": True,
    }
    if on_cpu:
        longest = sorted(len(prompt) for prompts in questions.values() for prompt in prompts)[-subject.most_at_once :]
        each = settings.max_new_tokens + 4 * (subject.most_draft_tokens + 1) + SPARE_TOKENS
        arguments["max_total_tokens"] = sum(longest) + each * len(longest)
    environment = {}
    if draft_tokens:
        drafts = subject.served("sglang", draft_tokens)
        arguments |= {**drafts, "speculative_draft_model_path": subject.draft.resolve()}
        environment = {cpu_speculative.SELECT: "1"} if on_cpu else {}
        known = (read_json(subject.draft / "config.json") or {}).get("max_position_embeddings")
        if known and known < subject.shape.max_positions:
            environment[LONGER_CONTEXT] = "1"
    log = subject.logs / f"evaluate-{draft_tokens}.log"
    # On a CPU both engines run on this node.
    others = None if on_cpu else subject.nodes
    timeout = start_timeout_s(config, subject.shape)
    return SGLangServer(arguments, log, environment, nodes=others, start_timeout_s=timeout)


def memory_for_two(shape: TargetShape) -> bool:
    """Whether two engines fit into this machine's free memory. Starting both at once halves the start-up time."""
    weights = sum(file.stat().st_size for file in shape.path.glob("*.safetensors"))
    widened = weights if shape.dtype == "float32" else 2 * weights
    return bool(2 * (widened + SERVER_BYTES) < psutil.virtual_memory().available)


@contextlib.contextmanager
def running(servers: Sequence[SGLangServer]) -> Iterator[None]:
    """Start servers at the same time, and end them together; if one cannot start, none runs."""
    try:
        with ThreadPoolExecutor(len(servers)) as pool:
            starts = [pool.submit(server.start) for server in servers]
            try:
                for start in as_completed(starts):
                    start.result()
            except BaseException:
                # The pool waits for all starts; a start ends when its process has ended.
                _stop(servers)
                raise
        yield
    finally:
        _stop(servers)


def _stop(servers: Sequence[SGLangServer]) -> None:
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(SGLangServer.stop, servers))


def sampling(settings: Evaluate, shape: TargetShape) -> dict[str, Any]:
    """Greedy decoding until the target ends its answer."""
    chosen: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "temperature": 0, "ignore_eos": False}
    return chosen | ({"stop_token_ids": list(shape.eos)} if shape.eos else {})


def warm_up(server: SGLangServer, subject: Subject, prompt: list[int]) -> None:
    """Send a first request, which pays for one-time initialisation, so that no measured one does."""
    with _refusals(server):
        few = sampling(subject.settings, subject.shape) | {"max_new_tokens": 8}
        server.generate({"input_ids": [prompt], "sampling_params": few})


def ask(server: SGLangServer, subject: Subject, prompts: list[list[int]], draft_tokens: int) -> DecodedAnswers:
    """The answers to all prompts, sent together."""
    with _refusals(server):
        started = time.monotonic()
        request = {"input_ids": prompts, "sampling_params": sampling(subject.settings, subject.shape)}
        results = server.generate(request, timeout_s=3600)
        seconds = time.monotonic() - started
    return answers_of(server, results, seconds, draft_tokens)


def answers_of(
    server: SGLangServer, results: Sequence[dict[str, Any]], seconds: float, draft_tokens: int
) -> DecodedAnswers:
    """SGLang's answers, with their verify steps.

    Raises:
        RunError: an answer was aborted.
    """
    histograms = []
    for result in results:
        reason = result["meta_info"]["finish_reason"]
        if reason["type"] not in ("stop", "length"):
            raise RunError(f"SGLang aborted an answer: {reason}; its log: {server.log}")
        told = result["meta_info"].get("spec_correct_drafts_histogram", [])
        histograms.append((*told, *[0] * (draft_tokens + 1 - len(told))))
    total = tuple(map(sum, zip(*histograms, strict=True)))
    return DecodedAnswers([result["output_ids"] for result in results], seconds, total, tuple(histograms))


def ask_in_steps(
    server: SGLangServer, subject: Subject, prompts: list[list[int]]
) -> list[tuple[list[int], list[VerifyStep]]]:
    """Decode a few of the prompts again, each verify step streamed, which takes time and is therefore not measured."""
    count = min(ANSWERS, len(prompts), subject.settings.batch_size)
    chosen = [prompts[i * len(prompts) // count] for i in range(count)]
    few = sampling(subject.settings, subject.shape)
    few["max_new_tokens"] = min(subject.settings.max_new_tokens, MOST_TOKENS)
    with _refusals(server):
        told = server.generate_in_steps({"input_ids": chosen, "sampling_params": few})
    found = []
    for index, prompt in enumerate(chosen):
        mine = [result for result in told if result.get("index", 0) == index]
        tokens = mine[-1]["output_ids"]
        histogram = mine[-1]["meta_info"].get("spec_correct_drafts_histogram", [])
        steps = steps_of([len(result["output_ids"]) for result in mine], tokens, histogram)
        if steps is not None:
            found.append((prompt, steps))
    return found


def logits_at(
    server: SGLangServer, partings: Sequence[Parting], prompts: list[list[int]], answers: DecodedAnswers
) -> list[tuple[float, float] | None]:
    """The target's logits of both tokens at each difference, up to a common constant.

    Args:
        server: the engine that decodes plainly.
        answers: that engine's.

    Returns:
        For each of ``partings`` the logits of the plain and of the speculative token; None where one answer ended, or
        the engine returns none.
    """
    found: list[tuple[float, float] | None] = []
    for parting in partings:
        pair = [parting.plain, parting.speculative]
        if None in pair:
            found.append(None)
            continue
        request = {
            "input_ids": [*prompts[parting.prompt], *answers.tokens[parting.prompt][: parting.position]],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "token_ids_logprob": pair,
        }
        try:
            told = server.generate(request)["meta_info"]["output_token_ids_logprobs"][0]
            known = {token: value for value, token, *_ in told}
            found.append((float(known[pair[0]]), float(known[pair[1]])))
        except (RequestRefused, KeyError, IndexError, TypeError):
            found.append(None)
    return found


@contextlib.contextmanager
def _refusals(server: SGLangServer) -> Iterator[None]:
    try:
        yield
    except RequestRefused as error:
        raise RunError(f"SGLang refused the evaluation's prompts: {error}; its log: {server.log}") from error
