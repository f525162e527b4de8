"""Snapshots through torch.distributed.checkpoint: a `StorageWriter` and a `StorageReader` in HDF5.

Every rank writes its shards into its own file and waits for the disk; then the coordinator renames the manifest into
place, so that half-written snapshots can't exist. A snapshot loads on any number of ranks.
"""

from __future__ import annotations

import io
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from specbatch import __version__
from specbatch.errors import AttemptError
from specbatch.snapshot import json_state
from specbatch.snapshot.chunks import chunk_files, dtype_name, dtype_of, part, write_tensor
from specbatch.snapshot.durable_file import DurableFile
from specbatch.snapshot.manifest import (
    FORMAT,
    MANIFEST,
    SnapshotManifest,
    StoredChunk,
    StoredTensor,
    read_manifest,
    write_manifest,
)


@dataclass(frozen=True)
class _Written:
    """What the coordinator gets for an item: the place of its chunk, or its value."""

    chunk: StoredChunk | None = None
    file_bytes: int = 0
    value: Any = None


class HDF5Writer(StorageWriter):
    """Write one snapshot.

    Args:
        snapshot: its folder; made if missing.
        step: optimizer steps done.
        facts: facts that must be the same when training continues; JSON.
        superseded: returns whether a later attempt owns the snapshots by now; then none of them is touched.

    An `OSError` of any rank, as of a full disk, arrives on all ranks as torch's `CheckpointException`; the folder
    then has no manifest.
    """

    def __init__(
        self,
        snapshot: Path,
        *,
        step: int,
        facts: dict[str, Any] | None = None,
        superseded: Callable[[], bool] = lambda: False,
    ) -> None:
        self.snapshot, self.step, self.facts = snapshot, step, facts or {}
        self.superseded = superseded
        self.ranks = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.snapshot = Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self._refuse_if_superseded()
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the plans; a snapshot that is written again is none until its end."""
        self._refuse_if_superseded()
        self.snapshot.mkdir(parents=True, exist_ok=True)
        (self.snapshot / MANIFEST).unlink(missing_ok=True)
        self.ranks = len(plans)
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # Not before all ranks have their plans: until then the coordinator may be deleting what a failed save left.
        self.snapshot.mkdir(parents=True, exist_ok=True)
        results = self._write_tensors(plan, planner)
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                pickled = planner.resolve_data(item)
                assert isinstance(pickled, io.BytesIO)
                results.append(
                    WriteResult(item.index, 0, _Written(value=json_state.from_torch(item.index.fqn, pickled)))
                )
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_tensors(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        items = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        if not items:
            return []
        name, results = f"rank-{plan.storage_data}.h5", []
        with DurableFile(self.snapshot / name) as disk:
            with h5py.File(disk, "w", libver="latest") as file, ThreadPoolExecutor(1, "checksums") as aside:
                for item in items:
                    tensor = planner.resolve_data(item)
                    assert isinstance(tensor, torch.Tensor)
                    offset = tuple(item.index.offset or ())
                    dataset = item.index.fqn + ("@" + ",".join(map(str, offset)) if any(offset) else "")
                    checksum = write_tensor(file, dataset, tensor, aside)
                    chunk = StoredChunk(offset, tuple(tensor.shape), name, dataset, checksum)
                    results.append(WriteResult(item.index, tensor.nbytes, _Written(chunk)))
                    if disk.error is not None:
                        break
            length = disk.bytes
        return [replace(result, storage_data=replace(result.storage_data, file_bytes=length)) for result in results]

    def _refuse_if_superseded(self) -> None:
        if self.superseded():
            raise AttemptError("a later attempt has taken over, and the snapshots are its own")

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._refuse_if_superseded()
        stored: dict[str, list[StoredChunk]] = defaultdict(list)
        files, found = {}, {}
        for result in (result for rank in results for result in rank):
            written: _Written = result.storage_data
            if written.chunk is None:
                found[result.index.fqn] = written.value
            else:
                stored[result.index.fqn].append(written.chunk)
                files[written.chunk.file] = written.file_bytes
        tensors = {
            name: StoredTensor(dtype_name(about.properties.dtype), tuple(about.size), tuple(stored[name]))
            for name, about in metadata.state_dict_metadata.items()
            if isinstance(about, TensorStorageMetadata)
        }
        write_manifest(
            self.snapshot,
            SnapshotManifest(
                format=FORMAT,
                specbatch=__version__,
                step=self.step,
                ranks=self.ranks,
                facts=self.facts,
                files=files,
                tensors=tensors,
                values=found,
                paths={name: tuple(path) for name, path in (metadata.planner_data or {}).items()},
            ),
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class HDF5Reader(StorageReader):
    """Read a snapshot.

    Args:
        snapshot: its folder.
        manifest: read from the folder if not given.

    Raises:
        DamagedSnapshot: here, or inside torch's `CheckpointException` when a chunk is not what was written.
    """

    def __init__(self, snapshot: Path, manifest: SnapshotManifest | None = None) -> None:
        self.snapshot = snapshot
        self.manifest = read_manifest(snapshot) if manifest is None else manifest

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader is for one snapshot."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        state: dict[str, STORAGE_TYPES] = {name: BytesStorageMetadata() for name in self.manifest.values}
        places: dict[MetadataIndex, StoredChunk] = {}
        for name, tensor in self.manifest.tensors.items():
            state[name] = TensorStorageMetadata(
                TensorProperties(dtype_of(tensor.dtype)),
                torch.Size(tensor.size),
                [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.size)) for c in tensor.chunks],
            )
            places |= {MetadataIndex(name, torch.Size(chunk.offset)): chunk for chunk in tensor.chunks}
        return Metadata(state, planner_data=dict(self.manifest.paths), storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        places: dict[MetadataIndex, StoredChunk] = self.read_metadata().storage_data
        wanted: dict[StoredChunk, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, json_state.to_torch(self.manifest.values[name]))
            else:
                wanted[places[item.storage_index]].append(item)
        with chunk_files(self.snapshot) as files:
            for chunk, items in wanted.items():
                name = items[0].storage_index.fqn
                stored = files.read(name, dtype_of(self.manifest.tensors[name].dtype), chunk)
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(stored[part(item.storage_offsets, item.lengths)])
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
