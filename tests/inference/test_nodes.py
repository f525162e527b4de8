"""An engine over several nodes: one server of SGLang, whichever of its parts is lost."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from specbatch.dispatch.client import Client
from specbatch.inference.nodes import follow, further_nodes
from specbatch.inference.place import EnginePart
from tests.inference.lab import engine_processes
from tests.inference.run import ATTEMPT, Trainer, in_thread, stage
from tests.inference.test_engine import texts

pytestmark = pytest.mark.light
NAME = "engine-0"


def _writes_to(process: psutil.Process, log: Path) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/fd/1").readlink() == log
    return False


def lose_part(log: Path) -> None:
    """Kill the process that computes for the part whose log this is."""
    found = [process for process in engine_processes(log.parent) if _writes_to(process, log)]
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.parent() in found and "resource_tracker" not in " ".join(process.cmdline()):
                process.kill()
                return
    raise AssertionError(f"no part of an engine writes to {log}")


def test_an_engine_over_two_nodes_that_loses_one_gives_its_claims_back_and_comes_back_whole(
    tmp_path: Path, tiny_target: Path
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()
    with (
        stage(tmp_path, tiny_target, texts(40), window_bytes=600_000, deterministic=True, tensor_parallel=2) as made,
        contextlib.closing(Client(made.rendezvous)) as client,
        contextlib.closing(Client(made.rendezvous)) as rank,
    ):
        first, second = (EnginePart(2, node, "127.0.0.1") for node in range(2))
        log = made.run_dir.component_log(ATTEMPT, "engine", 1)
        threads = [in_thread(lambda: follow(made.run_dir, ATTEMPT, NAME, second, log))]
        with further_nodes(made.run_dir, ATTEMPT, NAME, first) as others:
            engine = made.engine(client, stuck_s=60.0, nodes=others)
            threads.append(in_thread(engine.run))
            trainer = Trainer(made, rank, reference)
            trainer.join()
            for step in range(1, made.plan.steps + 1):
                trainer.train(step)
                if step == 1:
                    lose_part(log)
            threads[-1][0].join(60)
        for thread, failures in threads:
            thread.join(30)
            assert not thread.is_alive()
            assert failures == []
        steps = range(1, made.plan.steps + 1)
        assert set(trainer.rows) == {pack.id for step in steps for pack in made.plan.packs(step)}
        assert engine.log.read_text(errors="replace").count("ready to roll") == 2
    assert engine_processes(tmp_path) == []
