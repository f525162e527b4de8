"""A run without training: a real store, a real dispatcher, and a trainer that only looks at what it gets."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specbatch.config import Config, Data, Inference, Run, Store, Target, Training, dump_config
from specbatch.corpus import Corpus, corpus_of, make_plan, planned_steps, prepare
from specbatch.dispatch.client import Client
from specbatch.dispatch.connection_file import ConnectionFile, Keys, publish
from specbatch.dispatch.dispatcher import Dispatcher
from specbatch.dispatch.messages import Phase
from specbatch.dispatch.server import Server
from specbatch.drafts.base import CaptureContract, algorithm_of
from specbatch.drafts.eagle3.config import Eagle3Draft
from specbatch.inference.engine import Engine
from specbatch.inference.nodes import FurtherNodes
from specbatch.pack_manifest import Manifest, PackId
from specbatch.plan import Plan
from specbatch.rundir import RunDir
from specbatch.target import TargetShape, read_target
from specbatch.transfer.master import Master
from specbatch.transfer.pack_reader import Destination, read_pack, remove_pack
from specbatch.transfer.store import StoreClient

ATTEMPT = 1


@dataclass
class Stage:
    """The environment that an engine needs."""

    config: Config
    target: TargetShape
    corpus: Corpus
    plan: Plan
    contract: CaptureContract
    run_dir: RunDir
    rendezvous: ConnectionFile
    server: Server
    store: StoreClient
    events: list[tuple[str, dict[str, object]]]

    def engine(self, client: Client, *, stuck_s: float, nodes: FurtherNodes | None = None) -> Engine:
        return Engine(
            self.config,
            self.target,
            self.corpus,
            client,
            self.rendezvous,
            name="engine-0-test",
            rendezvous_path=self.run_dir.rendezvous(ATTEMPT),
            log=self.run_dir.component_log(ATTEMPT, "engine", 0),
            nodes=nodes,
            stuck_s=stuck_s,
        )

    def wait(self, rank: Trainer, packs: list[PackId]) -> Iterator[Manifest | PackId]:
        """Manifests of packs as they come; the id alone of one that is void."""
        missing = list(packs)
        while missing:
            answer = rank.client.wait(0, missing)
            found = [*answer.stored, *(pack for pack, _ in answer.void)]
            for item in found:
                missing.remove(item.pack if isinstance(item, Manifest) else item)
                yield item
            assert answer.phase is Phase.WORK


@dataclass
class Trainer:
    """Rank 0 of 1, which trains nothing."""

    stage: Stage
    client: Client
    reference: torch.nn.Module
    memory: torch.Tensor = field(default_factory=lambda: torch.empty(4 << 20, dtype=torch.uint8))
    void: list[PackId] = field(default_factory=list)
    rows: dict[PackId, bytes] = field(default_factory=dict)
    """The rows of every pack."""

    def join(self) -> None:
        self.stage.store.register(self.memory.data_ptr(), self.memory.nbytes)
        self.client.join(0, 1, self.stage.store.segment, 64 << 20, 0)

    def train(self, step: int) -> None:
        """Get a step's packs, check each row, and release them."""
        packs = {pack.id: pack for pack in self.stage.plan.packs(step)}
        got: list[Manifest] = []
        for item in self.stage.wait(self, list(packs)):
            if isinstance(item, Manifest):
                self._check(item, packs[item.pack].samples)
                got.append(item)
            else:
                self.void.append(item)
        while not self.client.begin(0, step).go:
            pass
        for manifest in got:
            remove_pack(self.stage.store, self.stage.rendezvous.run, ATTEMPT, manifest)
        self.client.trained(0, step)

    def _check(self, manifest: Manifest, samples: tuple[int, ...]) -> None:
        contract, offset = self.stage.contract, 0
        destinations: list[Destination] = []
        for index in samples:
            for name, wanted in contract.rows(self.stage.corpus.sample(index).loss_mask).items():
                destinations.append(Destination(index, name, wanted.size, self.memory.data_ptr() + offset))
                offset += 2 * wanted.size * contract.widths[name]
        rendezvous = self.stage.rendezvous
        read_pack(
            self.stage.store,
            rendezvous.run,
            ATTEMPT,
            manifest,
            destinations,
            widths=contract.widths,
            seed=rendezvous.checksum_seed,
        )
        self.rows[manifest.pack] = self.memory[:offset].numpy().tobytes()
        for destination in destinations:
            width = contract.widths[destination.tensor]
            first = destination.pointer - self.memory.data_ptr()
            nbytes = 2 * destination.rows * width
            rows = self.memory[first : first + nbytes].view(torch.bfloat16).view(-1, width).float().numpy()
            sample = self.stage.corpus.sample(destination.sample)
            wanted = contract.rows(sample.loss_mask)[destination.tensor]
            np.testing.assert_allclose(
                rows, self._truth(sample.input_ids)[destination.tensor][wanted], rtol=2**-8, atol=1e-4
            )

    def _truth(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            states = self.reference(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True)
        aux = [states.hidden_states[layer + 1][0] for layer in self.stage.contract.layers]
        return {"aux": torch.cat(aux, dim=-1).numpy(), "last": states.hidden_states[-1][0].numpy()}


@contextlib.contextmanager
def stage(
    folder: Path, target: Path, texts: list[str], *, window_bytes: int, tokens_per_pack: int = 256, **inference: Any
) -> Iterator[Stage]:
    """A run whose store is planned to hold ``window_bytes``."""
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = Config(
        run=Run(dir=str(folder / "run")),
        target=Target(path=str(target), dtype="float32"),
        data=Data(
            train=[str(folder / "data.jsonl")],
            loss_on="all",
            max_tokens=tokens_per_pack,
            workers=1,
            cache_dir=str(folder / "cache"),
        ),
        draft=Eagle3Draft(vocab_size=None),
        training=Training(tokens_per_pack=tokens_per_pack, packs_per_step=2),
        inference=Inference(threads=1, heartbeat_s=1.0, **inference),
    )
    corpus = corpus_of(prepare(config))
    plan, shape = make_plan(config, corpus), read_target(config.target.path)
    contract = algorithm_of(config, shape).contract
    run_dir = RunDir(Path(config.run.dir))
    run_dir.make()
    run_dir.config.write_text(dump_config(config), encoding="utf-8")
    events: list[tuple[str, dict[str, object]]] = []
    dispatcher = Dispatcher(
        plan,
        steps=planned_steps(config, plan),
        bytes_of=lambda pack: sum(contract.bytes(corpus.sample(i).loss_mask) for i in pack.samples),
        usable=lambda segment: window_bytes,
        heartbeat_s=config.inference.heartbeat_s,
    )
    keys = Keys.new()
    with Master("127.0.0.1", folder / "master.log") as master, contextlib.ExitStack() as stack:
        rendezvous = ConnectionFile.new(
            keys,
            run="5eed",
            attempt=ATTEMPT,
            host="127.0.0.1",
            master_port=master.rpc_port,
            metrics_port=master.metrics_port,
            dispatcher_port=0,
        )
        store = stack.enter_context(
            contextlib.closing(StoreClient(rendezvous, Store(), segment_bytes=max(64 << 20, 2 * window_bytes)))
        )
        server = Server(
            dispatcher,
            keys,
            "127.0.0.1",
            run=rendezvous.run,
            attempt=ATTEMPT,
            event=lambda event, /, **facts: events.append((event, facts)),
            remove_prefix=store.remove_prefix,
        )
        rendezvous = ConnectionFile(
            **{name: getattr(rendezvous, name) for name in rendezvous.__struct_fields__}
            | {"dispatcher_port": server.port}
        )
        publish(run_dir.rendezvous(ATTEMPT), rendezvous)
        with server:
            yield Stage(config, shape, corpus, plan, contract, run_dir, rendezvous, server, store, events)


def in_thread(work: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    """Run an engine, or what a node has of it, beside the test."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, failures
