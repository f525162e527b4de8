"""A run without engines: a real dispatcher, a real store, real ranks, and a producer of rows from a seed."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from specbatch.config import Config, Data, Inference, Run, Snapshot, Store, Target, Training, dump_config
from specbatch.config.rules import Bytes, Interval
from specbatch.corpus import Corpus, attach, make_plan, open_corpus, planned_steps, prepare
from specbatch.dispatch.client import Client, DispatcherGone
from specbatch.dispatch.connection_file import ConnectionFile, Keys, publish
from specbatch.dispatch.dispatcher import Dispatcher
from specbatch.dispatch.messages import Fault, Granted, Phase, Report
from specbatch.dispatch.server import Server
from specbatch.drafts.base import CaptureContract, algorithm_of
from specbatch.drafts.eagle3.config import Eagle3Draft
from specbatch.drafts.pack import ContextShard
from specbatch.pack_manifest import Chunk, Manifest, PackId, object_key
from specbatch.plan import Pack
from specbatch.rundir import RunDir
from specbatch.snapshot.manifest import read_manifest, snapshot_path
from specbatch.snapshot.reading import read_tensors
from specbatch.target import read_target
from specbatch.training.feed.buffers import PackRows, Part, within
from specbatch.transfer.master import Master
from specbatch.transfer.memory import checksum
from specbatch.transfer.store import StoreClient, StoreError, usable_bytes

PARTS = 5
"""Objects of a tensor of a sample, where it has so many rows."""
TIMES = ("seconds", "wait_s", "snapshot_s", "tokens_per_s")
AGENT = """
import logging, sys
from pathlib import Path
from specbatch.training.process.agent import main
logging.basicConfig(level=logging.INFO, format="%(asctime)s agent %(message)s")
main(Path(sys.argv[1]), int(sys.argv[2]))
"""


def make_config(target: Path, folder: Path, *, ranks: int = 2, samples: int = 66) -> Config:
    """Packs of one to three samples, four a step; the last step has one pack and three empty ones."""
    data, heldout = folder / "data.jsonl", folder / "heldout.jsonl"
    if not data.exists():
        write_conversations(data, samples)
        write_conversations(heldout, 12, seed=1)
    return Config(
        run=Run(dir=str(folder / "run"), seed=3, stall_timeout_s=60.0),
        target=Target(path=str(target)),
        data=Data(train=[str(data)], heldout=[str(heldout)], max_tokens=96, workers=1, cache_dir=str(folder / "cache")),
        draft=Eagle3Draft(ttt_steps=3, vocab_size=128),
        training=Training(
            ranks=ranks,
            threads=1,
            tokens_per_pack=192,
            packs_per_step=4,
            epochs=1,
            learning_rate=3e-3,
            warmup_steps=3,
            weight_decay=0.1,
            max_grad_norm=0.05,
            dtype="float32",
            max_restarts=2,
            evaluate_interval_steps=3,
            evaluate_packs=3,
        ),
        inference=Inference(heartbeat_s=1.0),
        store=Store(bytes_per_rank=Bytes(32 << 20)),
        snapshot=Snapshot(interval=Interval("3")),
    )


def write_conversations(path: Path, count: int, seed: int = 0) -> None:
    """Short ones of random words, different lengths."""
    rng = random.Random(seed)
    words = "the licence of this work grants you rights to copy and to change any part".split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            question, answer = (" ".join(rng.choices(words, k=rng.randint(2, 9))) for _ in range(2))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


@dataclass
class Faults:
    """Mistakes of the producer."""

    void: set[PackId] = field(default_factory=set)
    """Packs that it says it can't compute."""
    wrong_once: set[PackId] = field(default_factory=set)
    """Packs whose first objects are not what their manifest says."""
    second_loses: set[PackId] = field(default_factory=set)
    """Packs of which no object is what its manifest says, but for those that the first of two ranks that train a pack
    together reads."""
    nan: set[PackId] = field(default_factory=set)
    """Packs with a row of NaN."""


class Producer(threading.Thread):
    """Claims packs and stores rows that depend on sample and tensor alone, some chunks of a tensor where it can."""

    def __init__(self, stage: Stage, faults: Faults) -> None:
        super().__init__(name="producer", daemon=True)
        self.stage, self.faults = stage, faults
        self.client = Client(stage.rendezvous, deadline_s=5.0)
        self.store = StoreClient(stage.rendezvous, stage.config.store)
        self.last_step = 1 << 30
        """Packs of later steps are held back."""
        self.ended = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.ended.is_set():
                reply = self.client.claim("producer", 1)
                if reply.phase is not Phase.WORK:
                    self.ended.wait(0.1)
                for granted in reply.granted:
                    self._compute(granted)
        except DispatcherGone:
            pass
        except BaseException as error:  # for the test to show
            self.error = error

    def _compute(self, granted: Granted) -> None:
        while self.stage.plan.step_of(granted.pack) > self.last_step:
            if self.ended.wait(0.1) or self.client.heartbeat("producer", [granted.claim], "ready").revoked:
                return
        if granted.pack in self.faults.void:
            self.client.failed("producer", granted.claim, "the test says so", Fault.PACK)
            return
        try:
            manifest = self._put(granted)
        except StoreError as error:
            self.client.failed("producer", granted.claim, str(error), Fault.OTHER)
            return
        self.client.stored("producer", [manifest])

    def _put(self, granted: Granted) -> Manifest:
        tensors: list[torch.Tensor] = []
        chunks: list[Chunk] = []
        once = granted.pack in self.faults.wrong_once
        self.faults.wrong_once.discard(granted.pack)
        read = self._first_reads(granted.pack) if granted.pack in self.faults.second_loses else None
        seen = dict.fromkeys(self.stage.contract.widths, 0)
        for sample in self.stage.pack(granted.pack).samples:
            for tensor, rows in self.stage.rows(sample).items():
                if granted.pack in self.faults.nan:
                    rows[0, 0] = float("nan")
                first = 0
                for part in rows.tensor_split(PARTS):
                    end = first + part.shape[0]
                    if first == end:
                        continue
                    spared = read is None or within(read[tensor], seen[tensor] + first, seen[tensor] + end)
                    seed = self.stage.rendezvous.checksum_seed + (once or not spared)
                    tensors.append(part)
                    chunks.append(Chunk(sample, tensor, first, end - first, part.nbytes, checksum(part, seed)))
                    first = end
                seen[tensor] += rows.shape[0]
        manifest = Manifest(granted.claim, granted.pack, tuple(chunks))
        keys = [object_key(self.stage.rendezvous.run, self.stage.attempt, manifest, chunk) for chunk in chunks]
        self.store.put(keys, [t.data_ptr() for t in tensors], [t.nbytes for t in tensors], segment=granted.segment)
        return manifest

    def _first_reads(self, pack: PackId) -> Part:
        """Return the rows that the first of two ranks reads of a shared pack."""
        rows = PackRows.of(self.stage.pack(pack), self.stage.corpus, self.stage.contract)
        mask = torch.from_numpy(rows.loss_mask)
        return self.stage.algorithm.share_rows(mask, rows.lengths, rows.samples, ContextShard(0, 2))


class Stage:
    """One attempt of a run; more of them can follow each other on the same run directory."""

    def __init__(self, config: Config, master: Master, *, attempt: int = 1, faults: Faults | None = None) -> None:
        self.config, self.attempt = config, attempt
        self.run_dir = RunDir(Path(config.run.dir))
        if attempt == 1:
            self.run_dir.root.mkdir(parents=True)
            self.run_dir.config.write_text(dump_config(config), encoding="utf-8")
            attach(self.run_dir, prepare(config))
        self.corpus = open_corpus(self.run_dir)
        self.plan = make_plan(config, self.corpus)
        self.steps = planned_steps(config, self.plan)
        self.algorithm = algorithm_of(config, read_target(config.target.path))
        self.contract = self.algorithm.contract
        dispatcher = Dispatcher(
            self.plan,
            steps=self.steps,
            bytes_of=lambda pack: sum(self.contract.bytes(self.corpus.sample(i).loss_mask) for i in pack.samples),
            usable=usable_bytes,
            heartbeat_s=config.inference.heartbeat_s,
            ranks_per_pack=config.training.context_parallel,
        )
        keys, run = Keys.new(), f"{zlib.crc32(config.run.dir.encode()):x}"
        self.server = Server(
            dispatcher, keys, master.host, run=run, attempt=attempt,
            event=lambda event, /, **facts: None, remove_prefix=lambda prefix: None,
        )  # fmt: skip
        self.rendezvous = ConnectionFile(
            run, attempt, master.host, master.rpc_port, master.metrics_port, self.server.port,
            keys.server_public, keys.client_public, keys.client_secret, keys.checksum_seed,
        )  # fmt: skip
        self.producer = Producer(self, faults or Faults())
        self.agent: subprocess.Popen[str] | None = None

    def __enter__(self) -> Stage:
        self.server.start()
        self.producer.start()
        publish(self.run_dir.rendezvous(self.attempt), self.rendezvous)
        command = [sys.executable, "-c", AGENT, str(self.run_dir.root), str(self.attempt)]
        log = self.run_dir.component_log(self.attempt, "agent", 0)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            self.agent = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.agent is not None
        self.agent.kill()
        self.agent.wait()
        self.producer.ended.set()
        self.producer.join(timeout=10)
        self.producer.client.close()
        self.server.stop()
        self.producer.store.close()

    def end(self, timeout_s: float = 240.0) -> int:
        """Wait for the agent; its exit code."""
        assert self.agent is not None
        try:
            code = self.agent.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.tell()) from self.producer.error
        if self.producer.error is not None:
            raise self.producer.error
        return code

    def reach(self, step: int, timeout_s: float = 240.0) -> None:
        """Wait until the ranks trained a step."""
        until = time.monotonic() + timeout_s
        while self.report().step < step:
            assert self.agent is not None
            if self.agent.poll() is not None or time.monotonic() > until or self.producer.error:
                raise AssertionError(self.tell()) from self.producer.error
            time.sleep(0.05)

    def report(self) -> Report:
        return self.server.report()

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, in their order."""
        assert self.agent is not None
        found = [
            child
            for child in psutil.Process(self.agent.pid).children()
            if "specbatch.training.process.rank" in child.cmdline()
        ]
        return sorted(found, key=lambda child: int(child.environ()["RANK"]))

    def deaths(self) -> int:
        """Return the number of deaths of ranks, whether or not they were restarted."""
        return self.run_dir.component_log(self.attempt, "agent", 0).read_text().count("ranks died")

    def tell(self) -> str:
        """All logs, for a test that fails."""
        logs = sorted((self.run_dir.attempt(self.attempt) / "logs").glob("*.log"))
        return "\n".join([str(self.report()), *(f"== {path}\n{path.read_text()[-6000:]}" for path in logs)])

    def pack(self, pack: PackId) -> Pack:
        return self.plan.pack(pack)

    def rows(self, sample: int) -> dict[str, torch.Tensor]:
        return target_rows(self.corpus, self.contract, sample)

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.run_dir.metrics.read_text().splitlines()]

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """All tensors of a snapshot."""
        return read_tensors(snapshot_path(self.run_dir.snapshots, step))

    def values(self, step: int) -> dict[str, Any]:
        """All values of a snapshot that are not tensors."""
        return read_manifest(snapshot_path(self.run_dir.snapshots, step)).values


@contextlib.contextmanager
def store_master(folder: Path) -> Iterator[Master]:
    """A master for several runs after each other: their keys differ."""
    with Master("127.0.0.1", folder / "master.log") as master:
        yield master


def target_rows(corpus: Corpus, contract: CaptureContract, sample: int) -> dict[str, torch.Tensor]:
    """Return states that a target might have computed: bfloat16 ``[rows, width]``."""
    result = {}
    for tensor, positions in contract.rows(corpus.sample(sample).loss_mask).items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{sample} {tensor}".encode()))
        shape = (len(positions), contract.widths[tensor])
        result[tensor] = torch.randn(shape, generator=generator).to(torch.bfloat16)
    return result


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results that must be the same in two runs."""
    return [
        {k: without_times([v])[0] if k == "evaluation" else v for k, v in line.items() if k not in TIMES}
        for line in lines
    ]
