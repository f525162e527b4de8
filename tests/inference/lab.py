"""A store, a capturing engine and the truth to compare it with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from specbatch.dispatch.connection_file import ConnectionFile, Keys, publish
from specbatch.inference.capture_request import Captured, CaptureSettings, NotCaptured, new_capture_request
from specbatch.inference.capture_server import CaptureServer
from specbatch.pack_manifest import Chunk, Manifest, object_key
from specbatch.transfer.memory import checksum
from specbatch.transfer.store import StoreClient

RUN, ATTEMPT = "5eed", 1
AUX_LAYERS = (0, 2, 4)
HIDDEN = 64
NAN_TOKEN = 511
"""A token of the flawed target that makes its states NaN."""
WIDTHS = {"aux": len(AUX_LAYERS) * HIDDEN, "last": HIDDEN}


@dataclass
class Lab:
    """A real store with one segment, and where an engine finds it."""

    rendezvous: ConnectionFile
    rendezvous_path: Path
    store: StoreClient
    memory: torch.Tensor
    """uint8, registered with the store."""

    def settings(self, **changes: Any) -> CaptureSettings:
        """Settings of a capture plugin."""
        values: dict[str, Any] = {
            "rendezvous": str(self.rendezvous_path),
            "attempt": ATTEMPT,
            "results": "",
            "protocol": "tcp",
            "devices": "",
            "layers": AUX_LAYERS,
            "widths": WIDTHS,
            "sources": {"aux": ((0, WIDTHS["aux"]),), "last": None},
            "buffer_bytes": 8 << 20,
            "put_timeout_s": 20.0,
        }
        return CaptureSettings(**(values | changes))

    def read(self, captured: Captured) -> dict[str, np.ndarray]:
        """The rows of a sample, from the store, as float32 ``[rows, width]``; checks every chunk."""
        parts: dict[str, list[np.ndarray]] = {name: [] for name in WIDTHS}
        for chunk in sorted(captured.chunks, key=lambda chunk: chunk.first_token):
            parts[chunk.tensor].append(self._read_chunk(captured.claim, chunk))
        return {name: np.concatenate(rows) if rows else np.empty((0, WIDTHS[name])) for name, rows in parts.items()}

    def _read_chunk(self, claim: int, chunk: Chunk) -> np.ndarray:
        rows = self.memory[: chunk.bytes].view(torch.bfloat16).view(chunk.rows, WIDTHS[chunk.tensor])
        key = object_key(RUN, ATTEMPT, Manifest(claim, (0, claim), ()), chunk)
        assert self.store.get([key], [rows.data_ptr()], [rows.nbytes]) == [None]
        assert checksum(rows, self.rendezvous.checksum_seed) == chunk.checksum
        return rows.float().numpy()


def new_rendezvous(path: Path, host: str, port: int) -> ConnectionFile:
    """Publish a rendezvous whose store is real."""
    keys = Keys.new()
    rendezvous = ConnectionFile.new(
        keys,
        run=RUN,
        attempt=ATTEMPT,
        host=host,
        master_port=port,
        dispatcher_port=0,
    )
    publish(path, rendezvous)
    return rendezvous


class Claims:
    """Numbers that were not given before in this store."""

    def __init__(self) -> None:
        self._next = 0

    def new(self) -> int:
        self._next += 1
        return self._next


CLAIMS = Claims()


def capture(
    server: CaptureServer, samples: Sequence[np.ndarray], *, timeout_s: float = 120.0
) -> dict[int, Captured | NotCaptured]:
    """Have all rows of samples captured, sent at once as one claim; results by sample."""
    claim = CLAIMS.new()
    rows = [{name: np.arange(len(sample)) for name in WIDTHS} for sample in samples]
    return capture_rows(server, samples, rows, claim=claim, timeout_s=timeout_s)


def capture_rows(
    server: CaptureServer,
    samples: Sequence[np.ndarray],
    rows: Sequence[dict[str, np.ndarray]],
    *,
    claim: int,
    timeout_s: float = 120.0,
) -> dict[int, Captured | NotCaptured]:
    """The same with chosen rows."""
    captures = [
        new_capture_request(claim, (0, claim), i, "", sample, wanted)
        for i, (sample, wanted) in enumerate(zip(samples, rows, strict=True))
    ]
    server.send(captures, samples)
    found: dict[int, Captured | NotCaptured] = {}
    until = time.monotonic() + timeout_s
    while len(found) < len(samples) and time.monotonic() < until:
        for result in server.results(0.2):
            if result.claim == claim:
                for sample in range(len(samples)) if result.sample is None else [result.sample]:
                    found[sample] = result
    return found


def truth(model: torch.nn.Module, sample: np.ndarray) -> dict[str, np.ndarray]:
    """Return what transformers computes for a sample, float32 ``[tokens, width]``."""
    with torch.no_grad():
        states = model(torch.from_numpy(sample.astype(np.int64))[None], output_hidden_states=True).hidden_states
    aux = torch.cat([states[layer + 1][0] for layer in AUX_LAYERS], dim=-1)
    return {"aux": aux.float().numpy(), "last": states[-1][0].float().numpy()}


def random_samples(lengths: Sequence[int], vocabulary: int = NAN_TOKEN) -> list[np.ndarray]:
    """int32 token ids, the same for the same lengths."""
    generator = np.random.default_rng(7)
    return [generator.integers(0, vocabulary, length, dtype=np.int32) for length in lengths]


def engine_processes(folder: Path) -> list[psutil.Process]:
    """Processes of engines whose logs lie in this folder; other tests' engines may be up too."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process.pid}/fd/1").readlink().is_relative_to(folder):
                found.append(process)
    return found


def schedulers(folder: Path) -> list[psutil.Process]:
    """Return an engine's computing processes, which have the store's client loaded."""
    found = []
    for process in engine_processes(folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(mapped.path.endswith("mooncake/store.so") for mapped in process.memory_maps()):
                found.append(process)
    return found
