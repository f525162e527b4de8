"""Checks that SGLang serves the target on this node and captures what the contract says, and measures how fast."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from specbatch.config.engine_nodes import nodes_per_engine
from specbatch.corpus import Corpus, make_plan, open_corpus
from specbatch.corpus.images import as_sent
from specbatch.doctor.finding import Finding, failed, guarded, not_checked
from specbatch.doctor.site import CheckTask
from specbatch.doctor.store import JOIN_S, connection_of, segment_of
from specbatch.doctor.trial import ATTEMPT
from specbatch.drafts.base import CaptureContract, algorithm_of
from specbatch.errors import RunError
from specbatch.inference.capture_request import (
    Captured,
    CaptureRequest,
    NotCaptured,
    needed_tokens,
    new_capture_request,
)
from specbatch.inference.capture_server import CaptureServer, ContractBroken
from specbatch.inference.classes import check_class
from specbatch.inference.engine import capture_server, capture_settings
from specbatch.inference.nodes import FurtherNodes, follow, further_nodes
from specbatch.inference.place import EnginePart
from specbatch.inference.resolution import check_engine
from specbatch.inference.server import EngineError
from specbatch.inference.staging import stage
from specbatch.pack_manifest import Manifest, object_key
from specbatch.plan import Pack
from specbatch.planning.rates import ASSUMED_GPU, assumed_engine
from specbatch.planning.work import PlannedWork, work_of
from specbatch.rundir import RunDir
from specbatch.target import TargetShape, read_target
from specbatch.transfer.store import StoreClient, store_of, usable_bytes
from specbatch.units import bytes_text

PACKS, PACKS_S = 8, 30.0
"""Number of packs, and seconds, after which measuring ends."""
CAPTURED = "captured rows"
RATE = "prefill"


def served(place: CheckTask) -> Iterator[Finding]:
    """Check that SGLang has the target's class, and would start with the run's arguments."""
    config, target = place.config, read_target(place.config.target.path)
    check_class(target.architecture, target.path)
    for warning in check_engine(config, target):
        yield Finding("SGLang's arguments", warning, "", "", "warning")
    yield Finding("target's class", f"SGLang serves {target.architecture}", "a class that captures hidden states")


def captures(place: CheckTask, address: str, join_s: float = JOIN_S) -> Iterator[Finding]:
    """Start the engine, have it verify what it captures, and measure how fast it does. On a further node of an engine,
    work as its part until it has ended.

    Args:
        address: of this node.
        join_s: seconds to wait for head, trainers and the engine's other nodes.
    """
    run_dir, nodes = RunDir(place.root), nodes_per_engine(place.config) if place.slurm else 1
    part = EnginePart(nodes, place.task % nodes, address)
    name = f"engine-{part.first_task(place.task)}"
    connection_of(place, join_s)
    if part.rank:
        follow(run_dir, ATTEMPT, name, part, run_dir.component_log(ATTEMPT, "engine", place.task), join_s)
        yield Finding("engine", f"{name}: this is node {part.rank + 1} of {nodes}", "what its first node found")
        return
    with further_nodes(run_dir, ATTEMPT, name, part, join_s) as others:
        if place.slurm and place.config.slurm.stage_target:
            yield _copied(place)
        yield from _started(place, others, join_s)


def _copied(place: CheckTask) -> Finding:
    """Copy the target to this node, as a run's engines do."""
    target, begun = read_target(place.config.target.path), time.monotonic()
    stage(str(target.path), threading.Event())
    seconds, count = time.monotonic() - begun, target.weights.total_bytes
    found = f"{bytes_text(count)} in {seconds:.1f} s, {count / max(seconds, 1e-3) / 1e9:.2f} GB/s"
    return Finding("copying the target", found, f"once a node, to {place.config.slurm.stage_target}")


def _started(place: CheckTask, others: FurtherNodes | None, join_s: float) -> Iterator[Finding]:
    config, target = place.config, read_target(place.config.target.path)
    run_dir = RunDir(place.root)
    contract = algorithm_of(config, target).contract
    log = run_dir.component_log(ATTEMPT, "engine", place.task)
    settings = capture_settings(config, target, contract, run_dir.rendezvous(ATTEMPT), ATTEMPT)
    begun = time.monotonic()
    expected = "started, with the target loaded"
    try:
        with capture_server(config, target, settings, log, requests=2, nodes=others) as server:
            yield Finding("engine", _start_text(begun, others), expected)
            layers = ", ".join(map(str, contract.layers))
            yield Finding(
                CAPTURED, f"the outputs of layers {layers}, and the last states", "the input of the next layer"
            )
            yield from guarded(RATE, lambda: _measured(place, target, contract, server, join_s))
    except ContractBroken as error:
        yield Finding("engine", _start_text(begun, others), expected)
        yield failed(
            CAPTURED,
            str(error).partition("; its log ")[0],
            "the input of the next layer",
            "a draft would learn from other states than it is served: use another target or SGLang, and report it",
        )
    except EngineError as error:
        yield failed(
            "engine", str(error), expected, f"its log {log} says why; inference.sglang takes SGLang's arguments"
        )
        yield not_checked(CAPTURED, "the engine did not start")


def _start_text(begun: float, others: FurtherNodes | None) -> str:
    where = f" on {others.count} nodes" if others is not None else ""
    return f"started in {time.monotonic() - begun:.0f} s{where}"


def _measured(
    place: CheckTask, target: TargetShape, contract: CaptureContract, server: CaptureServer, join_s: float
) -> Iterator[Finding]:
    """Measure how fast full packs are captured and stored, without the first, which includes one-time costs."""
    config = place.config
    segment, size = segment_of(place, join_s)
    connection, corpus = connection_of(place, join_s), open_corpus(RunDir(place.root))
    work, plan = work_of(config, corpus), make_plan(config, corpus)
    packs = [pack for step in range(1, plan.steps + 1) for pack in plan.packs(step)]
    client = StoreClient(connection, store_of(config, "inference"), deadline_s=60.0)
    done: list[Pack] = []
    nodes = config.slurm.training.nodes if place.slurm else 1
    sharing = -(-config.inference.engines // nodes)
    with contextlib.closing(client):
        until, begun = time.monotonic() + PACKS_S, time.monotonic()
        for claim, pack in enumerate(packs[: PACKS + 1], 1):
            bytes_of = sum(contract.bytes(corpus.sample(i).loss_mask) for i in pack.samples)
            if bytes_of * sharing > usable_bytes(size):
                why = f"{sharing} packs are more than the {bytes_text(size)} that a training node lent to the store"
                yield not_checked(RATE, why)
                return
            number = place.task * (PACKS + 1) + claim
            captured = _capture(server, corpus, contract, pack, number, segment)
            keys = [
                object_key(connection.run, ATTEMPT, Manifest(number, pack.id, ()), chunk)
                for result in captured
                for chunk in result.chunks
            ]
            client.remove(keys)
            if claim == 1:
                begun = time.monotonic()
                until = begun + PACKS_S
            else:
                done.append(pack)
            if time.monotonic() > until and done:
                break
        seconds = time.monotonic() - begun
    yield _speed(place, work, plan_tokens(corpus, done), done, seconds, target)


def plan_tokens(corpus: Corpus, packs: list[Pack]) -> int:
    """Return the tokens of packs."""
    return int(sum(corpus.lengths[list(pack.samples)].sum() for pack in packs))


def _speed(
    place: CheckTask, work: PlannedWork, tokens: int, packs: list[Pack], seconds: float, target: TargetShape
) -> Finding:
    config, flops = place.config, work.engine_flops_of(packs) / seconds
    kind = config.inference.gpu or ASSUMED_GPU
    assumed = assumed_engine(
        kind, config.inference.tensor_parallel, work.weight_format, experts=target.experts is not None,
        peak_tflops=None if config.inference.gpu else config.slurm.gpu_tflops,
    )  # fmt: skip
    expected = f"{tokens / seconds * assumed.flops_per_s / flops:,.0f} tokens/s ({assumed.source})"
    expected = expected if place.gpus_needed else ""
    found = f"{tokens / seconds:,.0f} tokens/s captured and stored, {len(packs)} packs one after the other"
    return Finding(RATE, found, expected, rates={"engine_flops_per_s": flops, "engine_tokens_per_s": tokens / seconds})


def _capture(
    server: CaptureServer, corpus: Corpus, contract: CaptureContract, pack: Pack, claim: int, segment: str
) -> list[Captured]:
    """Capture and store a pack.

    Raises:
        RunError: it was not.
    """
    requests: list[CaptureRequest] = []
    tokens, images = [], []
    for index in pack.samples:
        sample = corpus.sample(index)
        rows = contract.rows(sample.loss_mask)
        ids = sample.input_ids[: needed_tokens(sample, rows)]
        requests.append(new_capture_request(claim, pack.id, index, segment, ids, rows))
        tokens.append(as_sent(ids, sample.images))
        images.append([image.url() for image in sample.images])
    server.send(requests, tokens, images)
    found: list[Captured] = []
    until = time.monotonic() + 120.0
    while len(found) < len(requests):
        for result in server.results(0.2):
            if isinstance(result, NotCaptured):
                raise RunError(f"sample {result.sample} was not captured: {result.why}")
            found.append(result)
        if time.monotonic() > until:
            raise RunError(f"{len(requests) - len(found)} samples were not captured within 120 s")
    return found
