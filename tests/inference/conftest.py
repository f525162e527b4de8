"""A real store and real engines, shared by the tests of this folder: each engine takes ten seconds to start."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from specbatch.config import Store
from specbatch.inference.capture_server import CaptureServer
from specbatch.transfer.master import Master
from specbatch.transfer.store import StoreClient
from tests.inference.lab import AUX_LAYERS, NAN_TOKEN, Lab, new_rendezvous
from tests.tiny_target import make_tiny_target


@pytest.fixture(scope="session")
def flawed_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target with one token whose embedding is not a number."""
    target = make_tiny_target(tmp_path_factory.mktemp("flawed") / "tiny")
    tensors = load_file(target / "model.safetensors")
    tensors["model.embed_tokens.weight"][NAN_TOKEN] = torch.nan
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="session")
def reference(flawed_target: Path) -> torch.nn.Module:
    """The same target in transformers, float32."""
    model = AutoModelForCausalLM.from_pretrained(flawed_target, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A store with 64 MiB."""
    folder = tmp_path_factory.mktemp("store")
    with Master("127.0.0.1", folder / "master.log") as master:
        path = folder / "rendezvous.json"
        rendezvous = new_rendezvous(path, "127.0.0.1", master.rpc_port)
        with contextlib.closing(StoreClient(rendezvous, Store(), segment_bytes=64 << 20)) as store:
            memory = torch.empty(16 << 20, dtype=torch.uint8)
            store.register(memory.data_ptr(), memory.nbytes)
            yield Lab(rendezvous, path, store, memory)


@pytest.fixture(scope="session")
def start(lab: Lab, flawed_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., CaptureServer]:
    """Make a capturing server of the flawed target, by SGLang's arguments; not yet started."""

    def make(settings: dict[str, Any] | None = None, **arguments: Any) -> CaptureServer:
        return CaptureServer(
            {"model_path": str(flawed_target), "dtype": "float32", **arguments},
            tmp_path_factory.mktemp("engine") / "engine.log",
            lab.settings(**(settings or {})),
            layer_ids=AUX_LAYERS,
            threads=1,
        )

    return make


@pytest.fixture(scope="session")
def whole(start: Callable[..., CaptureServer]) -> Iterator[CaptureServer]:
    """An engine that never cuts a prefill; its ring holds less than a batch, and its rows wait briefly for room."""
    with start({"buffer_bytes": 1 << 20, "put_timeout_s": 1.5}, chunked_prefill_size=-1) as server:
        yield server


@pytest.fixture(scope="session")
def chunked(start: Callable[..., CaptureServer]) -> Iterator[CaptureServer]:
    """An engine that cuts prefills every 128 tokens."""
    with start(chunked_prefill_size=128) as server:
        yield server
