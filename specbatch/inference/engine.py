"""One engine of a run: claims packs, has their hidden states captured, and reports where they are stored.

It has no state that others need: when it dies, other engines compute its packs. It leaves when the dispatcher allows
it.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from specbatch.config import Config, load_config
from specbatch.corpus import Corpus, make_plan, open_corpus, planned_steps
from specbatch.corpus.images import ImageError, as_sent
from specbatch.dispatch.client import Client
from specbatch.dispatch.connection_file import ConnectionFile, wait_for
from specbatch.dispatch.messages import Fault, Granted, Phase
from specbatch.drafts.base import CaptureContract, algorithm_of
from specbatch.drafts.sglang import layer_ids
from specbatch.errors import EngineIncomplete
from specbatch.inference.arguments import engine_arguments, engine_environment, most_tokens, start_timeout_s
from specbatch.inference.capture_request import (
    Captured,
    CaptureSettings,
    NotCaptured,
    needed_tokens,
    new_capture_request,
    sources,
)
from specbatch.inference.capture_server import CaptureServer, ContractBroken
from specbatch.inference.engine_loop import EngineLoop
from specbatch.inference.inflight import InFlight
from specbatch.inference.nodes import FurtherNodes
from specbatch.inference.pace import MOST_IN_FLIGHT, Pace
from specbatch.pack_manifest import Manifest, PackId
from specbatch.plan import Plan
from specbatch.rundir import RunDir
from specbatch.snapshot.manifest import whole_snapshots
from specbatch.target import TargetShape, read_target
from specbatch.transfer.mooncake import store_module
from specbatch.transfer.store import store_of

logger = logging.getLogger(__name__)

STUCK_S = 300.0
"""Seconds without a completed sample after which an engine with work is restarted; as SGLang's own watchdog."""
PUT_TIMEOUT_S = 60.0
RENDEZVOUS_TIMEOUT_S = 600.0
POLL_S = 0.2


def main(run_dir: Path, attempt: int, task: int, nodes: FurtherNodes | None = None) -> None:
    """Run an engine until all steps are trained or the attempt ends.

    Args:
        nodes: that have a part of it, besides this one.

    Raises:
        RunError: if the engine can't be kept alive, or the dispatcher is gone.
    """
    paths = RunDir(run_dir)
    with joined(paths, attempt, f"engine-{task}", paths.component_log(attempt, "engine", task), nodes) as engine:
        if engine.needed(paths.snapshots):
            engine.run()


@contextlib.contextmanager
def joined(paths: RunDir, attempt: int, name: str, log: Path, nodes: FurtherNodes | None = None) -> Iterator[Engine]:
    """Provide an engine of an attempt, ready to run.

    Args:
        name: base of the engine's name; a suffix makes it unique, also among restarts of the same task.
        log: SGLang's log file.
        nodes: that have a part of it, besides this one.

    Raises:
        RunError: the attempt's head has not published its addresses in time.
        UserError: Mooncake is missing, or too old.
    """
    config = load_config(paths.config)
    store_module()  # checked early, since SGLang's processes need it only once the model is loaded
    target = read_target(config.target.path)
    corpus = open_corpus(paths)
    rendezvous = wait_for(paths.rendezvous(attempt), attempt, RENDEZVOUS_TIMEOUT_S, "packs")
    with contextlib.closing(Client(rendezvous)) as client:
        yield Engine(
            config,
            target,
            corpus,
            client,
            rendezvous,
            name=f"{name}-{secrets.token_hex(2)}",
            rendezvous_path=paths.rendezvous(attempt),
            log=log,
            nodes=nodes,
        )


def drain(run_dir: Path, attempt: int, why: str) -> None:
    """Tell the dispatcher that the attempt has to end, which is all that a component does about a signal."""
    rendezvous = wait_for(RunDir(run_dir).rendezvous(attempt), attempt, 0.0)
    with contextlib.closing(Client(rendezvous)) as client:
        client.drain(why)


class Engine(EngineLoop):
    """An engine around a capturing server.

    Args:
        name: unique among all engines, earlier ones included.
        rendezvous_path: path of the rendezvous, for the plugin.
        log: SGLang's log file.
        nodes: that have a part of the engine, besides this one.
        stuck_s: see `STUCK_S`.
    """

    result = "a pack"

    def __init__(
        self,
        config: Config,
        target: TargetShape,
        corpus: Corpus,
        client: Client,
        rendezvous: ConnectionFile,
        *,
        name: str,
        rendezvous_path: Path,
        log: Path,
        nodes: FurtherNodes | None = None,
        stuck_s: float = STUCK_S,
    ) -> None:
        super().__init__(config, client, name=name, log=log)
        self.target, self.corpus = target, corpus
        self.plan: Plan = make_plan(config, corpus)
        self.contract: CaptureContract = algorithm_of(config, target).contract
        self.settings = capture_settings(config, target, self.contract, rendezvous_path, rendezvous.attempt)
        self.nodes = nodes
        self.stuck_s = stuck_s
        self.in_flight = InFlight(self.contract.widths)
        self.pace = Pace(config.inference.packs_in_flight, config.training.tokens_per_pack)
        self._progress_s = time.monotonic()
        self._server: CaptureServer | None = None

    def needed(self, snapshots: Path) -> bool:
        """Return whether anything is left to train. If not according to the snapshots, wait for the ranks, which may
        find them damaged."""
        last = planned_steps(self.config, self.plan)
        while last in whole_snapshots(snapshots):
            report = self.client.status()
            if report.phase is not Phase.WORK:
                logger.info("no engine is needed phase=%s", report.phase)
                return False
            if report.ranks == self.config.training.ranks:
                break
            time.sleep(POLL_S)
        return True

    def _serve(self) -> str | None:
        self._server = server = capture_server(
            self.config, self.target, self.settings, self.log, requests=self.pace.most, nodes=self.nodes
        )
        with server, self._claiming(self._wanted, lambda most, _: self._claim(server, most)):
            return self._settle(server)

    def _claims(self) -> dict[int, PackId]:
        return self.in_flight.claims

    def _tokens(self) -> int:
        return self.in_flight.tokens

    def _drop(self, claim: int) -> bool:
        return self.in_flight.drop(claim)

    def _stop_start(self) -> None:
        if self._server is not None:
            self._server.server.stop()

    def _before_restart(self, why: str) -> None:
        """End an engine that has lost a node.

        Raises:
            EngineIncomplete: it has.
        """
        if self.nodes is not None and self.nodes.gone:
            raise EngineIncomplete(why)

    def _settle(self, server: CaptureServer) -> str | None:
        """Report results until the engine may leave, or breaks.

        Raises:
            ContractBroken: what it computes is not what was planned.
        """
        self._progress_s = time.monotonic()
        while not self._leaving.is_set():
            manifests: list[Manifest] = []
            for result in server.results(POLL_S):
                if isinstance(result, NotCaptured) and result.sample is None and result.fault is Fault.OTHER:
                    return result.why
                if isinstance(result, NotCaptured) and result.final:
                    raise ContractBroken(result.why)
                with self._lock:
                    self._progress_s, before = time.monotonic(), self.in_flight.tokens
                    settled = self.in_flight.settle(result) if isinstance(result, Captured) else result
                    self.pace.computed(self.in_flight.tokens - before, self._progress_s)
                if isinstance(settled, Manifest):
                    manifests.append(settled)
                elif isinstance(settled, NotCaptured):
                    self._fail(settled.claim, settled.why, settled.fault)
                elif settled is not None:
                    self._failed(result.claim, settled, Fault.PACK)
            self._room.set()
            if manifests:
                self._stored(manifests)
            if why := server.trouble():
                return why
            if self.in_flight.claims and time.monotonic() - self._progress_s > self.stuck_s:
                claims = sorted(self.in_flight.claims)
                return f"it has computed nothing for {self.stuck_s:g} s, claims {claims} wait for it"
        return None

    def _wanted(self) -> int:
        return self.pace.wanted - len(self.in_flight.claims)

    def _claim(self, server: CaptureServer, most: int) -> Phase:
        """Claim packs and have them computed."""
        answer = self.client.claim(self.name, most)
        for granted in answer.granted:
            self._begin(server, granted)
        return answer.phase

    def _begin(self, server: CaptureServer, granted: Granted) -> None:
        """Send the samples of a pack that have rows to capture."""
        captures, tokens, images = [], [], []
        rows: list[tuple[int, str, int]] = []
        problem = None
        for index in self.plan.pack(granted.pack).samples:
            sample = self.corpus.sample(index)
            wanted = self.contract.rows(sample.loss_mask)
            rows += [(index, name, positions.size) for name, positions in wanted.items()]
            needed = needed_tokens(sample, wanted)
            if not needed:
                continue
            ids = sample.input_ids[:needed]
            problem = problem or refusal(index, ids, self.target, most_tokens(self.config, self.target))
            captures.append(new_capture_request(granted.claim, granted.pack, index, granted.segment, ids, wanted))
            tokens.append(as_sent(ids, sample.images))
            try:
                images.append([image.url() for image in sample.images])
            except ImageError as error:
                problem = problem or f"sample {index}, {self.corpus.place(index)}: {error}"
        with self._lock:
            if not self.in_flight.claims:
                self._progress_s = time.monotonic()
            self.in_flight.begin(granted, rows, {capture.sample: capture.tokens for capture in captures})
        if problem is not None:
            self._fail(granted.claim, problem, Fault.PACK)
        elif captures:
            server.send(captures, tokens, images)
        else:
            with self._lock:
                settled = self.in_flight.finish(granted.claim)
            assert isinstance(settled, Manifest)
            self._stored([settled])

    def _stored(self, manifests: list[Manifest]) -> None:
        self.client.stored(self.name, manifests)
        if any(manifest.chunks for manifest in manifests):
            self._restarts = 0
        self._suspects.difference_update(manifest.pack for manifest in manifests)
        for manifest in manifests:
            size = sum(chunk.bytes for chunk in manifest.chunks)
            logger.info("stored pack=%d.%d claim=%d bytes=%d", *manifest.pack, manifest.claim, size)


def capture_settings(
    config: Config, target: TargetShape, contract: CaptureContract, rendezvous: Path, attempt: int
) -> CaptureSettings:
    """Return the settings of the plugin in a run's engine.

    Args:
        rendezvous: file with the store's address.
    """
    return CaptureSettings(
        rendezvous=str(rendezvous),
        attempt=attempt,
        results="",
        protocol=config.store.protocol,
        devices=store_of(config, "inference").devices,
        layers=contract.layers,
        widths=contract.widths,
        sources=sources(contract, target.hidden),
        buffer_bytes=buffer_bytes(config, contract),
        put_timeout_s=PUT_TIMEOUT_S,
    )


def capture_server(
    config: Config,
    target: TargetShape,
    settings: CaptureSettings,
    log: Path,
    *,
    requests: int,
    nodes: FurtherNodes | None = None,
) -> CaptureServer:
    """Return a run's engine, which is not started yet. Arguments as for `CaptureServer`."""
    return CaptureServer(
        engine_arguments(config, target),
        log,
        settings,
        layer_ids=layer_ids(target.architecture, settings.layers),
        environment=engine_environment(config, target),
        threads=config.inference.threads,
        nodes=nodes,
        requests=requests,
        start_timeout_s=start_timeout_s(config, target),
    )


def refusal(sample: int, ids: np.ndarray, target: TargetShape, longest: int) -> str | None:
    """Return why a sample may not be sent, since SGLang's scheduler would crash or run something else; None if it
    may."""
    if ids.min() < 0 or ids.max() >= target.vocab:
        return f"sample {sample} has token id {int(ids.max())}, but the target's are 0 to {target.vocab - 1}"
    if len(ids) > longest:
        return f"sample {sample} has {len(ids)} tokens, but the engine accepts {longest}"
    return None


def buffer_bytes(config: Config, contract: CaptureContract) -> int:
    """Return the bytes of host memory for rows that are being stored: twice what `Pace` may have in hand, at most 1 GiB
    or four packs.

    Four packs, so that one is put, one waits, one is copied and one may arrive, at any rate; 1 GiB, since small packs
    come in larger numbers.
    """
    pack = config.training.tokens_per_pack * contract.bytes_per_token
    packs = config.inference.packs_in_flight or MOST_IN_FLIGHT
    most = max(1 << 30, 4 * pack)
    return max(16 << 20, min(most, 2 * packs * pack), (config.data.max_tokens + 1) * contract.bytes_per_token)
