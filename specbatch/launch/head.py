"""The head: it starts the store's master and the dispatcher, watches, and alone decides that an attempt ends."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specbatch.config import Config, load_config
from specbatch.dispatch.messages import Phase, Report
from specbatch.dispatch.rendezvous import Keys, Rendezvous, publish
from specbatch.dispatch.server import Server
from specbatch.dispatch.state import Dispatcher
from specbatch.errors import RunError
from specbatch.launch.marks import Mark, read_mark
from specbatch.launch.signals import on_signal
from specbatch.rundir import RunDir, write_json
from specbatch.transfer.master import Master

log = logging.getLogger(__name__)
TICK_S = 0.3
STOP_GRACE_S = 120.0
"""How long components may take to end after everybody was told to."""


def supervise(run_dir: RunDir, attempt: int) -> None:
    """Lead an attempt to its end and write down how it ended.

    Raises:
        RunError: the attempt failed.
    """
    config = load_config(run_dir.config)
    with _serving(run_dir, attempt, config) as (server, master):
        _Watch(run_dir, attempt, config, server, master).until_the_end()


@contextlib.contextmanager
def _serving(run_dir: RunDir, attempt: int, config: Config) -> Iterator[tuple[Server, Master]]:
    """Master and dispatcher, ready, with the rendezvous published."""
    from specbatch.corpus import make_plan, open_corpus, planned_steps
    from specbatch.target import capture_contract, read_target
    from specbatch.transfer.store import StoreClient

    corpus = open_corpus(run_dir)
    plan = make_plan(config, corpus)
    contract = capture_contract(config, read_target(config.target.path))
    host = head_host()
    events = _Events(run_dir.events(attempt))
    dispatcher = Dispatcher(
        plan,
        steps=planned_steps(config, plan),
        bytes_of=lambda pack: sum(contract.bytes(corpus.sample(i).loss_mask) for i in pack.samples),
        heartbeat_s=config.inference.heartbeat_s,
    )
    keys = Keys.new()
    master_log = run_dir.component_log(attempt, "master", 0)
    with Master(host, master_log) as master:
        rendezvous = Rendezvous(
            run=os.urandom(8).hex(),
            attempt=attempt,
            host=host,
            master_port=master.rpc_port,
            metrics_port=master.metrics_port,
            dispatcher_port=0,
            server_public=keys.server_public,
            client_public=keys.client_public,
            client_secret=keys.client_secret,
            checksum_seed=keys.checksum_seed,
        )
        store = StoreClient(rendezvous, config.store)
        server = Server(dispatcher, keys, host, event=events.write, remove_prefix=store.remove_prefix)
        with contextlib.closing(events), contextlib.closing(store), server:
            publish(run_dir.rendezvous(attempt), rendezvous)
            yield server, master


def head_host() -> str:
    """Address under which the other components reach this one."""
    return "127.0.0.1"
