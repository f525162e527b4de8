"""Network, store, kernels and GPUs: for real on this machine, and broken."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from specbatch.config import load_config
from specbatch.doctor import attention as kernels
from specbatch.doctor import engine, network, store
from specbatch.doctor.finding import Finding, guarded
from specbatch.doctor.gpu import Gpus, judge, usable
from specbatch.doctor.site import CheckTask
from specbatch.doctor.task import _why_not
from specbatch.doctor.trial import ATTEMPT, make_trial
from specbatch.inference.capture_server import ContractBroken
from specbatch.inference.server import ServerDied
from specbatch.run.head import serving
from specbatch.rundir import RunDir, write_json

CPU = torch.device("cpu")
H100 = Gpus("2.14.1", "13.0", ("sm_80", "sm_90", "compute_90"), ("NVIDIA H100",) * 2, ((9, 0),) * 2, (80 << 30,) * 2)


@pytest.fixture
def place(tmp_path: Path, tiny_target: Path) -> CheckTask:
    (tmp_path / "config.yaml").write_text(
        f"run: {{dir: '{tmp_path}'}}\ntarget: {{path: '{tiny_target}'}}\ndata: {{train: [a.jsonl]}}\n"
        "draft: {vocab_size: 64}\nstore: {bytes_per_rank: 64MiB}\n"
    )
    return CheckTask(load_config(tmp_path / "config.yaml"), "training", tmp_path, slurm=False)


def of(place: CheckTask, component: Any, *overrides: str, slurm: bool = False) -> CheckTask:
    config = load_config(place.root / "config.yaml", list(overrides))
    return dataclasses.replace(place, component=component, config=config, slurm=slurm)


def test_components_reach_each_other_and_say_how_fast_and_who_did_not_come(place: CheckTask):
    with network.listening(of(place, "head"), "127.0.0.1"), network.listening(of(place, "training"), "127.0.0.1"):
        findings = list(network.reach(of(place, "inference"), join_s=5.0))
        assert [finding.what for finding in findings] == ["network to head", "network to training"]
        for finding in findings:
            assert finding.verdict == "ok", finding
            assert finding.rates["network_to"] > 1e7
            assert finding.rates["network_from"] > 1e7
    missing, _ = network.reach(of(place, "training"), join_s=0.1)
    assert missing.verdict == "failed", "the head's listener has gone, and its file says where it was"
    lonely = list(network.reach(of(place, "head", "--slurm.inference.nodes=3", slurm=True), join_s=0.1))
    assert lonely[0].found == "3 of 3 nodes of inference did not appear within 0 s"


def test_a_node_without_a_route_is_named_with_the_remedies():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    finding = network.measure("network to training", "127.0.0.1", port, "node7")
    assert finding.verdict == "failed"
    assert finding.found.startswith(f"node7 is not reached at 127.0.0.1:{port}: ")
    assert "slurm.interface" in finding.remedy
    assert "slurm.ports" in finding.remedy


def lend(place: CheckTask, ended: Any) -> None:
    with store.lending(place, 20.0) as lent:
        assert lent.verdict == "ok"
        ended.wait()


@contextlib.contextmanager
def lender(place: CheckTask) -> Iterator[None]:
    """A training task in a process of its own: Mooncake's clients are made for one each."""
    context = multiprocessing.get_context("spawn")
    ended = context.Event()
    process = context.Process(target=lend, args=(place, ended))
    process.start()
    try:
        yield
    finally:
        ended.set()
        process.join()
    assert process.exitcode == 0


@pytest.mark.light
def test_the_store_carries_objects_into_a_trainer_s_memory_and_back(place: CheckTask):
    trial = make_trial(load_config(place.root / "config.yaml"), place.root / "doctor")
    place = dataclasses.replace(place, config=trial, root=place.root / "doctor")
    with serving(RunDir(place.root), ATTEMPT, trial, "127.0.0.1"):
        (nobody,) = guarded("store", lambda: store.round_trip(of(place, "inference"), join_s=0.1))
        assert "no training node lent memory to the store" in nobody.found
        with lender(place):
            finding = store.round_trip(of(place, "inference"), 60.0)
    assert finding.verdict == "ok", finding
    assert min(finding.rates.values()) > 1e6
    write_json(place.root / "segments" / "00000.json", ["nobody:1", 64 << 20])
    (gone,) = guarded("store", lambda: store.round_trip(of(place, "inference"), 0.1))
    assert gone.verdict == "failed"


def test_attention_is_that_of_dense_attention_and_one_that_is_not_is_found(monkeypatch: pytest.MonkeyPatch):
    finding = kernels.attention(4, 2, 16, CPU)
    assert finding.verdict == "ok", finding
    monkeypatch.setattr(kernels, "attend", lambda q, k, v, own, mask: 1.01 * right(q, k, v, own, mask))
    assert kernels.attention(4, 2, 16, CPU).verdict == "failed"


right = kernels.attend


def test_gpus_that_torch_has_no_kernels_for_are_said(place: CheckTask):
    asked = of(place, "training", "--slurm.training.gpus_per_node=2", "--training.ranks=2", slurm=True)
    assert judge(asked, H100).verdict == "ok"
    few = judge(asked, changed(H100, names=(), capabilities=(), bytes=()))
    assert (few.verdict, few.found) == ("failed", "torch 2.14.1 can use 0")
    for capability, works in (((9, 0), True), ((8, 6), True), ((10, 0), True), ((7, 0), False)):
        gpus = changed(H100, capabilities=(capability,) * 2)
        assert (judge(asked, gpus).verdict == "ok") == works, capability
    older = changed(H100, architectures=("sm_70",), capabilities=((7, 0),) * 2)
    assert judge(asked, older).verdict == "ok"
    # SGLang's own kernels begin later.
    serves = of(
        place, "inference", "--slurm.inference.gpus_per_node=2", "--inference.tensor_parallel=2", slurm=True
    )  # fmt: skip
    assert judge(serves, older).verdict == "failed"
    assert usable(of(place, "training", slurm=True)) == Finding("GPUs for torch", "no GPU asked", verdict="not checked")


def changed(gpus: Gpus, **changes: Any) -> Gpus:
    return msgspec.structs.replace(gpus, **changes)


@pytest.mark.parametrize(
    ("error", "failed"),
    [(ContractBroken("it is the output of layer 3; its log x ends:\ny"), "captured rows"), (ServerDied("x"), "engine")],
)
def test_an_engine_that_does_not_start_or_captures_other_rows_is_said(
    place: CheckTask, monkeypatch: pytest.MonkeyPatch, error: Exception, failed: str
):
    class Broken:
        def __init__(self, *arguments: object, **options: object) -> None: ...

        def __enter__(self) -> None:
            raise error

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(engine, "capture_server", Broken)
    monkeypatch.setattr(engine, "connection_of", lambda place, join_s: None)
    findings = guarded("engine", lambda: engine.captures(of(place, "inference"), "127.0.0.1"))
    assert [finding.what for finding in findings if finding.verdict == "failed"] == [failed]
    assert {finding.what for finding in findings} == {"engine", "captured rows"}


def test_an_engine_over_several_nodes_is_left_to_the_job(place: CheckTask):
    spread = of(place, "inference", "--inference.tensor_parallel=2", "--inference.nodes_per_engine=2")
    assert _why_not(spread, []) == "an engine spans 2 nodes: --submit checks there"
    assert _why_not(dataclasses.replace(spread, slurm=True), []) == ""


def test_a_class_that_captures_nothing_is_said(place: CheckTask, tmp_path: Path, tiny_target: Path):
    (served,) = guarded("target's class", lambda: engine.served(of(place, "inference")))
    assert served.verdict == "ok"
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_target.iterdir():
        (other / path.name).symlink_to(path)
    text = (tiny_target / "config.json").read_text().replace("LlamaForCausalLM", "MambaForCausalLM")
    (other / "config.json").unlink()
    (other / "config.json").write_text(text)
    (unknown,) = guarded("target's class", lambda: engine.served(of(place, "inference", f"--target.path={other}")))
    assert unknown.verdict == "failed"
    assert "MambaForCausalLM" in unknown.found
