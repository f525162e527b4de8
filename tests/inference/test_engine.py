"""An engine works for a real dispatcher, and whatever happens to it, every pack is computed."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from specbatch.dispatch.client import Client
from specbatch.errors import RunError
from specbatch.inference.engine import Engine
from specbatch.inference.pace import MOST_IN_FLIGHT
from tests.inference.lab import engine_processes, schedulers
from tests.inference.run import Stage, Trainer, in_thread, stage

pytestmark = pytest.mark.light
WORDS = ["the", "draft", "proposes", "what", "the", "target", "would", "have", "said", "if", "it", "were", "asked"]


def texts(count: int) -> list[str]:
    """Texts of many lengths."""
    return [" ".join(WORDS[(i * 7 + j) % len(WORDS)] + str(i) for j in range(4 + i * 5 % 37)) for i in range(count)]


def scheduler_of(engine: Engine, *, starts: int) -> psutil.Process:
    """The scheduler of an engine that has been started so often, as soon as it is ready."""
    until = time.monotonic() + 600
    while time.monotonic() < until:
        if engine.state == "ready" and engine.log.read_text(errors="replace").count("ready to roll") == starts:
            [scheduler] = schedulers(engine.log.parent)
            return scheduler
        time.sleep(0.1)
    raise AssertionError(f"the engine was not ready after {starts} starts")


def reference(target: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()


def test_a_killed_and_a_stuck_engine_lose_no_pack_and_a_refused_one_is_void(tmp_path: Path, tiny_target: Path) -> None:
    with (
        stage(
            tmp_path,
            tiny_target,
            [*texts(90), " ".join(WORDS * 20)],
            window_bytes=600_000,
            deterministic=True,
            # The longest sample does not fit.
            sglang={"context_length": 240},
        ) as made,
        contextlib.closing(Client(made.rendezvous)) as client,
        contextlib.closing(Client(made.rendezvous)) as rank,
    ):
        engine = made.engine(client, stuck_s=15.0)
        trainer = Trainer(made, rank, reference(tiny_target))
        thread, failures = in_thread(engine.run)
        trainer.join()
        steps = made.plan.steps
        assert steps > 10
        for step in range(1, steps + 1):
            trainer.train(step)
            if step == 2:
                scheduler_of(engine, starts=1).kill()
            if step == 5:
                scheduler_of(engine, starts=2).send_signal(signal.SIGSTOP)
        thread.join(60)
        assert not thread.is_alive()
        assert failures == []
        assert_complete(made, trainer)
        assert engine.log.read_text(errors="replace").count("ready to roll") == 3
        whys = [str(facts["why"]) for name, facts in made.events if name == "failed"]
        assert any("computed nothing for 15 s" in why for why in whys)
    assert engine_processes(tmp_path) == []


def assert_complete(made: Stage, trainer: Trainer) -> None:
    longest = int(made.corpus.lengths.argmax())
    packs = [pack for step in range(1, made.plan.steps + 1) for pack in made.plan.packs(step)]
    assert trainer.void == [pack.id for pack in packs if longest in pack.samples]
    assert set(trainer.rows) == {pack.id for pack in packs} - set(trainer.void)


def test_an_engine_leaves_while_it_starts(tmp_path: Path, tiny_target: Path) -> None:
    with (
        stage(tmp_path, tiny_target, texts(10), window_bytes=600_000) as made,
        contextlib.closing(Client(made.rendezvous)) as client,
    ):
        client.drain("the test says so")
        thread, failures = in_thread(made.engine(client, stuck_s=60.0).run)
        thread.join(60)
        assert not thread.is_alive()
        assert failures == []
    assert engine_processes(tmp_path) == []


def test_an_engine_is_never_idle_with_a_target_so_small_that_it_is_fast(tmp_path: Path, tiny_target: Path) -> None:
    words = [" ".join(WORDS[(i * 7 + j) % len(WORDS)] + str((i + j) % 97) for j in range(80)) for i in range(1200)]
    with (
        stage(tmp_path, tiny_target, words, window_bytes=400 << 20, tokens_per_pack=1024) as made,
        contextlib.closing(Client(made.rendezvous)) as client,
        contextlib.closing(Client(made.rendezvous)) as rank,
    ):
        rank.join(0, 1, made.store.segment, 400 << 20, 0)
        engine = made.engine(client, stuck_s=60.0)
        thread, failures = in_thread(engine.run)
        packs, idle = 2 * made.plan.steps, []
        while not failures and (stored := sum(name == "stored" for name, _ in made.events)) < packs - MOST_IN_FLIGHT:
            time.sleep(0.005)
            if stored:
                idle.append(not engine.in_flight.claims)
        rate = engine.pace.tokens_per_s
        client.drain("the test has seen enough")
        thread.join(60)
        assert failures == []
        print(f"{rate:,.0f} tokens/s, idle in {sum(idle)} of {len(idle)} looks")
        assert len(idle) > 100
        assert sum(idle) <= 0.02 * len(idle)


def test_an_engine_that_never_starts_is_given_up_with_its_log(tmp_path: Path, tiny_target: Path) -> None:
    with (
        stage(
            tmp_path, tiny_target, texts(10), window_bytes=600_000, max_restarts=1, sglang={"load_format": "nonsense"}
        ) as made,
        contextlib.closing(Client(made.rendezvous)) as client,
    ):
        with pytest.raises(RunError, match=r"(?s)broke 2 times.*nonsense"):
            made.engine(client, stuck_s=60.0).run()
        [report] = client.status().engines
        assert report.state == "restarting"
