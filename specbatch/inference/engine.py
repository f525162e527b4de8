"""One engine of a run: claims packs, has their hidden states captured, and says where they are.

It holds nothing that others need: when it dies, others compute its packs. It leaves when the dispatcher says so.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from specbatch.capture import CaptureContract
from specbatch.config import Config, load_config
from specbatch.corpus import Corpus, make_plan, open_corpus, planned_steps
from specbatch.dispatch.client import Client, DispatcherGone
from specbatch.dispatch.messages import Fault, Granted, Phase
from specbatch.dispatch.rendezvous import Rendezvous, wait_for
from specbatch.errors import RunError
from specbatch.inference.arguments import engine_arguments, engine_environment, most_tokens
from specbatch.inference.capturing import CapturingServer
from specbatch.inference.orders import Captured, NotCaptured, Settings, new_order
from specbatch.inference.server import EngineError
from specbatch.inference.work import Work
from specbatch.manifest import Manifest, PackId
from specbatch.plan import Plan
from specbatch.rundir import RunDir
from specbatch.snapshot.folder import whole_snapshots
from specbatch.target import TargetShape, capture_contract, read_target

logger = logging.getLogger(__name__)

STUCK_S = 300.0
"""An engine that has work and completes no sample for so long is started again. As SGLang's own watchdog."""
PUT_TIMEOUT_S = 60.0
RENDEZVOUS_TIMEOUT_S = 600.0
POLL_S = 0.2


def main(run_dir: Path, attempt: int, task: int) -> None:
    """Run an engine until all steps are trained or the attempt ends.

    Raises:
        RunError: if the engine can't be kept alive, or the dispatcher is gone.
    """
    paths = RunDir(run_dir)
    with joined(paths, attempt, f"engine-{task}", paths.component_log(attempt, "engine", task)) as engine:
        if engine.needed(paths.snapshots):
            engine.run()


@contextlib.contextmanager
def joined(paths: RunDir, attempt: int, name: str, log: Path) -> Iterator[Engine]:
    """An engine of an attempt, ready to run.

    Args:
        name: to which something is added that makes it unlike any other engine's, that of the same task before it
            was started again included.
        log: SGLang's log file.

    Raises:
        RunError: the attempt's head has not published its addresses in time.
    """
    config = load_config(paths.config)
    target = read_target(config.target.path)
    corpus = open_corpus(paths)
    rendezvous = wait_for(paths.rendezvous(attempt), attempt, RENDEZVOUS_TIMEOUT_S)
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
        )


def drain(run_dir: Path, attempt: int, why: str) -> None:
    """Tell the dispatcher that the attempt has to end: all that a component does about a signal."""
    rendezvous = wait_for(RunDir(run_dir).rendezvous(attempt), attempt, 0.0)
    with contextlib.closing(Client(rendezvous)) as client:
        client.drain(why)


class Engine:
    """The loop around a capturing server.

    Args:
        name: unlike that of any engine before.
        rendezvous_path: for the plugin.
        log: SGLang's log file.
        stuck_s: see `STUCK_S`.
    """

    def __init__(
        self,
        config: Config,
        target: TargetShape,
        corpus: Corpus,
        client: Client,
        rendezvous: Rendezvous,
        *,
        name: str,
        rendezvous_path: Path,
        log: Path,
        stuck_s: float = STUCK_S,
    ) -> None:
        self.config, self.target, self.corpus, self.client, self.name = config, target, corpus, client, name
        self.plan: Plan = make_plan(config, corpus)
        self.contract: CaptureContract = capture_contract(config, target)
        self.settings = Settings(
            rendezvous=str(rendezvous_path),
            attempt=rendezvous.attempt,
            results="",
            protocol=config.store.protocol,
            devices=config.store.devices,
            widths=self.contract.widths,
            buffer_bytes=buffer_bytes(config, self.contract),
            put_timeout_s=PUT_TIMEOUT_S,
        )
        self.log = log
        self.stuck_s = stuck_s
        self.work = Work(self.contract.widths)
        self.state = "starting"
        self._lock = threading.Lock()
        """Of ``work`` and what follows."""
        self._progress_s = time.monotonic()
        self._suspects: set[PackId] = set()
        self._restarts = 0
        self._leaving = threading.Event()
        self._called_away = ""
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._server: CapturingServer | None = None

    def needed(self, snapshots: Path) -> bool:
        """Whether anything is left to train. Where snapshots say no, wait for the ranks: they may find them damaged."""
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

    def run(self) -> None:
        """Work until the dispatcher says that this engine may leave.

        Raises:
            RunError: see `main`.
        """
        beats = threading.Thread(target=self._guarded, args=(self._beat,), name="heartbeat", daemon=True)
        beats.start()
        try:
            while (why := self._serve()) is not None:
                self._restart(why)
            if self._called_away:
                self._give_back(self._called_away)
        finally:
            self._ended.set()
            beats.join()
        if self._failure is not None:
            raise self._failure
        logger.info("engine leaves name=%s tokens=%d", self.name, self.work.tokens)

    def leave(self, why: str) -> None:
        """Have the engine leave before the dispatcher lets it, from any thread: others compute its packs."""
        self._called_away = why
        self._leave()

    def _give_back(self, why: str) -> None:
        """Better than to fall silent: that would be noticed only some heartbeats later."""
        with contextlib.suppress(DispatcherGone):
            for claim in list(self.work.claims):
                self._fail(claim, why, Fault.OTHER)

    def _serve(self) -> str | None:
        """Start a server and work with it; returns why it has to be started again, or None to leave."""
        server = CapturingServer(
            engine_arguments(self.config, self.target),
            self.log,
            self.settings,
            aux_layers=self.contract.aux_layers,
            environment=engine_environment(self.config, self.target),
            threads=self.config.inference.threads,
            requests=self.config.inference.packs_in_flight,
            start_timeout_s=self.config.inference.start_timeout_s,
        )
        self._server = server
        try:
            with server:
                self.state = "ready"
                broken = threading.Event()
                claims = threading.Thread(
                    target=self._guarded, args=(lambda: self._claim(server, broken),), name="claims", daemon=True
                )
                claims.start()
                try:
                    return self._settle(server)
                finally:
                    broken.set()
                    claims.join()
        except EngineError as error:
            # Asked to leave while it started, which ends it.
            return None if self._leaving.is_set() else str(error)

    def _settle(self, server: CapturingServer) -> str | None:
        """Report results until the engine may leave, or breaks."""
        self._progress_s = time.monotonic()
        while not self._leaving.is_set():
            manifests: list[Manifest] = []
            for result in server.results(POLL_S):
                if isinstance(result, NotCaptured) and result.sample is None and result.fault is Fault.OTHER:
                    return result.why
                with self._lock:
                    self._progress_s = time.monotonic()
                    settled = self.work.settle(result) if isinstance(result, Captured) else result
                if isinstance(settled, Manifest):
                    manifests.append(settled)
                elif isinstance(settled, NotCaptured):
                    self._fail(settled.claim, settled.why, settled.fault)
                elif settled is not None:
                    self._failed(result.claim, settled, Fault.PACK)
            if manifests:
                self._stored(manifests)
            if not server.alive():
                return "its process ended"
            if self.work.claims and time.monotonic() - self._progress_s > self.stuck_s:
                return f"it has computed nothing for {self.stuck_s:g} s, claims {sorted(self.work.claims)} wait for it"
        return None

    def _claim(self, server: CapturingServer, broken: threading.Event) -> None:
        """Claim packs and have them computed, as long as the server is whole."""
        while not (broken.is_set() or self._leaving.is_set()):
            room = self.config.inference.packs_in_flight - len(self.work.claims)
            if room < 1:
                broken.wait(POLL_S / 4)
                continue
            answer = self.client.claim(self.name, room)
            if answer.phase is not Phase.WORK:
                self._leaving.set()
            for granted in answer.granted:
                self._begin(server, granted)

    def _begin(self, server: CapturingServer, granted: Granted) -> None:
        """Send the samples of a pack, as far as anything of them is wanted."""
        orders, tokens = [], []
        rows: list[tuple[int, str, int]] = []
        problem = None
        for index in self.plan.pack(granted.pack).samples:
            sample = self.corpus.sample(index)
            wanted = self.contract.rows(sample.loss_mask)
            rows += [(index, name, positions.size) for name, positions in wanted.items()]
            # The states of a token depend on those before it only.
            needed = max((int(positions[-1]) + 1 for positions in wanted.values() if positions.size), default=0)
            if not needed:
                continue
            ids = sample.input_ids[:needed]
            problem = problem or refusal(index, ids, self.target, most_tokens(self.config, self.target))
            orders.append(new_order(granted.claim, granted.pack, index, granted.segment, ids, wanted))
            tokens.append(ids)
        with self._lock:
            if not self.work.claims:
                self._progress_s = time.monotonic()
            self.work.begin(granted, rows, {order.sample: order.tokens for order in orders})
        if problem is not None:
            self._fail(granted.claim, problem, Fault.PACK)
        elif orders:
            server.send(orders, tokens)
        else:
            with self._lock:
                settled = self.work.finish(granted.claim)
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

    def _fail(self, claim: int, why: str, fault: Fault) -> None:
        """Give a claim back, unless it is not in flight any more."""
        with self._lock:
            known = self.work.drop(claim)
        if known:
            self._failed(claim, why, fault)

    def _failed(self, claim: int, why: str, fault: Fault) -> None:
        logger.warning("failed claim=%d fault=%s why=%s", claim, fault.value, why)
        self.client.failed(self.name, claim, why, fault)

    def _restart(self, why: str) -> None:
        """Give all claims back and count.

        Raises:
            RunError: if the server was started too often for nothing.
        """
        self.state = "restarting"
        self._restarts += 1
        logger.warning("engine broke restarts=%d why=%s", self._restarts, why)
        for claim, pack in self.work.claims.items():
            # Twice the same pack, and it may be what breaks engines.
            fault = Fault.PACK if pack in self._suspects else Fault.OTHER
            self._suspects.add(pack)
            self._fail(claim, f"the engine broke: {why.splitlines()[0]}", fault)
        if self._restarts > self.config.inference.max_restarts:
            raise RunError(
                f"the engine broke {self._restarts} times without computing a pack in between, the last time: {why}\n"
                f"Its log: {self.log}"
            )

    def _beat(self) -> None:
        """Say that the engine lives, and hear what it shall do."""
        tokens, since = 0, time.monotonic()
        while True:
            with self._lock:
                claims, total = list(self.work.claims), self.work.tokens
            now = time.monotonic()
            rate, tokens, since = (total - tokens) / max(now - since, 1e-3), total, now
            beat = self.client.heartbeat(self.name, claims, self.state, rate)
            for claim in beat.revoked:
                with self._lock:
                    known = self.work.drop(claim)
                if known:
                    logger.info("revoked claim=%d", claim)
            if beat.phase is not Phase.WORK:
                self._leave()
            if self._ended.wait(self.config.inference.heartbeat_s):
                return

    def _leave(self) -> None:
        self._leaving.set()
        if self._server is not None and self.state != "ready":
            self._server.server.stop()

    def _guarded(self, work: Callable[[], None]) -> None:
        """Run a thread's work; its failure ends the engine."""
        try:
            work()
        except BaseException as error:
            self._failure = self._failure or error
            self._leave()


def refusal(sample: int, ids: np.ndarray, target: TargetShape, longest: int) -> str | None:
    """Why a sample may not be sent: SGLang's scheduler would die of it, or run something else. None if it may."""
    if ids.min() < 0 or ids.max() >= target.vocab:
        return f"sample {sample} has token id {int(ids.max())}, the target knows 0 to {target.vocab - 1}"
    if len(ids) > longest:
        return f"sample {sample} has {len(ids)} tokens, the engine takes {longest}"
    return None


def buffer_bytes(config: Config, contract: CaptureContract) -> int:
    """Host memory for rows on their way into the store: all packs in flight twice, at most 1 GiB or one sample."""
    token = 2 * sum(contract.widths.values())
    wanted = 2 * config.inference.packs_in_flight * config.training.tokens_per_pack * token
    return max(16 << 20, min(1 << 30, wanted), (config.data.max_tokens + 1) * token)
