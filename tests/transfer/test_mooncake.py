"""The store's client, and what reads through it, with a real store: no loss is silent, nothing wrong is trained."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specbatch.config import Store
from specbatch.pack_manifest import Chunk, Manifest, object_key
from specbatch.transfer.master import Master
from specbatch.transfer.memory import checksum
from specbatch.transfer.pack_reader import Destination, PackLost, read_pack, remove_pack
from specbatch.transfer.store import StoreClient, StoreFull
from tests.transfer.owner import Address, owner

pytestmark = pytest.mark.light

MB = 1 << 20
SEED = 0xFEDC_BA98_7654_3210
WIDTHS = {"aux": 3 * 64, "last": 64}


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    with Master("127.0.0.1", tmp_path_factory.mktemp("master") / "log") as made:
        yield made


@pytest.fixture(scope="module")
def producer(master: Master) -> Iterator[StoreClient]:
    """Lends nothing, as engines do."""
    with contextlib.closing(StoreClient(Address(master.rpc_port), Store())) as made:
        yield made


@pytest.fixture(scope="module")
def consumer(master: Master) -> Iterator[StoreClient]:
    """Lends 64 MB, as a rank does."""
    with contextlib.closing(StoreClient(Address(master.rpc_port), Store(), segment_bytes=64 * MB)) as made:
        yield made


@pytest.fixture(scope="module")
def source(producer: StoreClient) -> torch.Tensor:
    """8 MB of the producer's memory, registered."""
    memory = torch.randint(0, 256, (8 * MB,), dtype=torch.uint8)
    producer.register(memory.data_ptr(), memory.nbytes)
    return memory


@pytest.fixture(scope="module")
def room(consumer: StoreClient) -> torch.Tensor:
    """8 MB of the consumer's memory, registered."""
    memory = torch.zeros(8 * MB, dtype=torch.uint8)
    consumer.register(memory.data_ptr(), memory.nbytes)
    return memory


PACKS = itertools.count()


class Rows:
    """A pack's rows in the producer's memory, and room for them in the consumer's."""

    def __init__(self, producer: StoreClient, consumer: StoreClient, source: torch.Tensor, room: torch.Tensor) -> None:
        self.producer, self.consumer = producer, consumer
        pack = next(PACKS)
        shapes = {
            (sample, tensor): (count, WIDTHS[tensor])
            for sample in (4, 9)
            for tensor, count in (("aux", 300), ("last", 120))
        }
        self.rows = self._cut(source, shapes)
        self.room = self._cut(room, shapes)
        for rows in self.rows.values():
            rows.normal_(generator=torch.Generator().manual_seed(pack))
        for rows in self.room.values():
            rows.zero_()
        self.manifest = Manifest(1, (0, pack), tuple(chunk for chunk, _ in self.pieces()))

    def _cut(self, memory: torch.Tensor, shapes: dict) -> dict[tuple[int, str], torch.Tensor]:
        sizes = [count * width for count, width in shapes.values()]
        parts = memory.view(torch.bfloat16)[: sum(sizes)].split(sizes)
        return {key: part.view(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}

    def pieces(self) -> Iterator[tuple[Chunk, torch.Tensor]]:
        """Two chunks a tensor."""
        for (sample, tensor), rows in self.rows.items():
            for first, part in ((0, rows[:100]), (128, rows[100:])):
                yield Chunk(sample, tensor, first, len(part), part.nbytes, checksum(part, SEED)), part

    def key(self, chunk: Chunk) -> str:
        return object_key("ab", 1, self.manifest, chunk)

    def put(self, segment: str) -> None:
        pieces = list(self.pieces())
        self.producer.put(
            [self.key(chunk) for chunk, _ in pieces],
            [part.data_ptr() for _, part in pieces],
            [part.nbytes for _, part in pieces],
            segment=segment,
        )

    def read(self) -> None:
        where = [Destination(*key, len(room), room.data_ptr()) for key, room in self.room.items()]
        read_pack(self.consumer, "ab", 1, self.manifest, where, widths=WIDTHS, seed=SEED)

    def whole(self) -> bool:
        return all(torch.equal(self.rows[key].view(torch.int16), self.room[key].view(torch.int16)) for key in self.rows)


@pytest.fixture
def rows(producer: StoreClient, consumer: StoreClient, source: torch.Tensor, room: torch.Tensor) -> Iterator[Rows]:
    made = Rows(producer, consumer, source, room)
    made.put(consumer.segment)
    yield made
    remove_pack(consumer, "ab", 1, made.manifest)


def test_rows_come_back_bit_for_bit_from_several_chunks(rows: Rows):
    rows.read()
    assert rows.whole()


def test_an_object_that_was_removed_is_lost(rows: Rows):
    rows.producer.remove([rows.key(rows.manifest.chunks[3])])
    with pytest.raises(PackLost, match=r"object ab/1/.*: it is not there"):
        rows.read()


def test_a_removed_pack_is_lost_and_removing_it_again_is_no_error(rows: Rows):
    remove_pack(rows.consumer, "ab", 1, rows.manifest)
    remove_pack(rows.consumer, "ab", 1, rows.manifest)
    with pytest.raises(PackLost, match="and 7 more"):
        rows.read()


def test_an_object_overwritten_by_noise_of_the_same_length_is_lost(rows: Rows):
    chunk, part = next(rows.pieces())
    rows.producer.remove([rows.key(chunk)])
    noise = torch.randint(0, 256, (part.nbytes,), dtype=torch.uint8)
    rows.producer.put([rows.key(chunk)], [noise.data_ptr()], [noise.nbytes])
    with pytest.raises(PackLost, match="its bytes are not those that were stored"):
        rows.read()


@pytest.mark.parametrize(("change", "problem"), [(-128, "bytes instead of"), (128, "does not have")])
def test_an_object_of_another_length_is_lost(rows: Rows, change: int, problem: str):
    chunk, part = next(rows.pieces())
    rows.producer.remove([rows.key(chunk)])
    noise = torch.zeros(part.nbytes + change, dtype=torch.uint8)
    rows.producer.put([rows.key(chunk)], [noise.data_ptr()], [noise.nbytes])
    with pytest.raises(PackLost, match=problem):
        rows.read()


def test_an_existing_key_keeps_its_bytes_and_is_caught_by_the_checksum(rows: Rows):
    """Mooncake answers 0 to such a put; claims are given once, so it can't happen to us."""
    chunk, part = next(rows.pieces())
    noise = torch.ones(part.nbytes, dtype=torch.uint8)
    rows.producer.put([rows.key(chunk)], [noise.data_ptr()], [noise.nbytes])
    rows.read()
    assert rows.whole()


def test_a_prefix_removes_its_objects_and_no_others(
    producer: StoreClient, consumer: StoreClient, source: torch.Tensor, room: torch.Tensor
):
    keys = ["r/1/0.1/1/a", "r/1/0.1/1/b", "r/1/0.1/10/a", "r/1/0x1/1/a", "q/r/1/0.1/1/a"]
    producer.put(keys, [source.data_ptr()] * 5, [1024] * 5)
    assert producer.remove_prefix("r/1/0.1/1/") == 2
    found = consumer.get(keys, [room.data_ptr() + 1024 * i for i in range(5)], [1024] * 5)
    assert [problem is None for problem in found] == [False, False, True, True, True]
    assert sum(producer.remove_prefix(prefix) for prefix in ("r/", "q/")) == 3


def test_a_full_store_refuses_loses_nothing_and_takes_more_once_there_is_room(
    producer: StoreClient, consumer: StoreClient, source: torch.Tensor, room: torch.Tensor
):
    data = source
    keys = [f"full/{i}" for i in range(12)]
    with pytest.raises(StoreFull) as full:
        producer.put(keys, [data.data_ptr()] * 12, [data.nbytes] * 12, segment=consumer.segment, wait_s=0.2)
    stored = [key for key, is_stored in zip(keys, full.value.stored, strict=True) if is_stored]
    left = [key for key in keys if key not in stored]
    assert 5 <= len(stored) <= 8
    for key in stored:
        assert consumer.get([key], [room.data_ptr()], [room.nbytes]) == [None]
        assert torch.equal(room, data)
    timer = threading.Timer(0.3, consumer.remove, (stored[:2],))
    timer.start()
    producer.put(left[:2], [data.data_ptr()] * 2, [data.nbytes] * 2, wait_s=20)
    timer.join()
    assert consumer.get(stored[2:3] + left[1:2], [room.data_ptr()] * 2, [room.nbytes] * 2) == [None, None]
    assert producer.remove_prefix("full/") == len(stored)


def test_objects_are_put_into_the_segment_that_was_asked_for(master: Master, rows: Rows):
    with owner(master.rpc_port, 64 * MB) as other:
        data = torch.ones(MB, dtype=torch.uint8)
        rows.producer.put(["where/1"], [data.data_ptr()], [data.nbytes], segment=other.segment)
        other.process.kill()
        rows.read()
        problem = rows.consumer.get(["where/1"], [data.data_ptr()], [data.nbytes])[0]
        assert problem is not None
        rows.producer.remove(["where/1"])


def test_what_lay_with_an_owner_that_was_killed_is_lost(
    master: Master, producer: StoreClient, consumer: StoreClient, source: torch.Tensor, room: torch.Tensor
):
    with owner(master.rpc_port, 64 * MB) as other:
        rows = Rows(producer, consumer, source, room)
        rows.put(other.segment)
        rows.read()
        assert rows.whole()
        other.process.kill()
        other.process.wait()
        begun = time.monotonic()
        with pytest.raises(PackLost):
            rows.read()
        assert time.monotonic() - begun < 25
    remove_pack(producer, "ab", 1, rows.manifest)


def test_an_owner_that_hangs_costs_no_more_than_the_deadline(master: Master, producer: StoreClient):
    """And its late answer can't fall into memory that is used again."""
    with owner(master.rpc_port, 64 * MB) as other:
        address = Address(master.rpc_port)
        with contextlib.closing(StoreClient(address, Store(), deadline_s=1.0)) as impatient:
            data, room = torch.ones(4 * MB, dtype=torch.uint8), torch.zeros(8 * MB, dtype=torch.uint8)
            impatient.register(room.data_ptr(), room.nbytes)
            producer.put(["hang/1"], [data.data_ptr()], [data.nbytes], segment=other.segment)
            other.process.send_signal(signal.SIGSTOP)
            begun = time.monotonic()
            assert impatient.get(["hang/1"], [room.data_ptr()], [data.nbytes]) == ["no answer within 1 s"]
            assert impatient.get(["hang/1"], [room.data_ptr() + MB], [data.nbytes]) == [
                "an earlier read into the same memory has not ended"
            ]
            assert impatient.get(["none"], [room.data_ptr() + 4 * MB], [data.nbytes]) == ["it is not there (code -704)"]
            assert time.monotonic() - begun < 10
            other.process.send_signal(signal.SIGCONT)
            until = time.monotonic() + 30
            while impatient.get(["hang/1"], [room.data_ptr()], [data.nbytes]) != [None]:
                assert time.monotonic() < until
                time.sleep(0.2)
            assert bool((room[: data.nbytes] == 1).all())
    producer.remove(["hang/1"])


def test_two_masters_side_by_side_know_nothing_of_each_other(master: Master, producer: StoreClient, tmp_path: Path):
    data = torch.ones(1024, dtype=torch.uint8)
    with Master("127.0.0.1", tmp_path / "log") as second:
        other = StoreClient(Address(second.rpc_port), Store(), segment_bytes=16 * MB)
        with contextlib.closing(other):
            other.put(["same"], [data.data_ptr()], [data.nbytes])
            assert producer.get(["same"], [data.data_ptr()], [data.nbytes]) == ["it is not there (code -704)"]


def test_four_clients_started_at_once_behind_a_proxy_have_segments_of_their_own(
    master: Master, producer: StoreClient, consumer: StoreClient
):
    proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9"}
    with contextlib.ExitStack() as stack:
        segments: list[str] = []
        threads = [
            threading.Thread(
                target=lambda: segments.append(stack.enter_context(owner(master.rpc_port, 16 * MB, **proxy)).segment)
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert len(set(segments)) == 4
        data = torch.arange(4096, dtype=torch.uint8)
        room = torch.zeros_like(data)
        for segment in segments:
            producer.put([f"of/{segment}"], [data.data_ptr()], [data.nbytes], segment=segment)
            assert consumer.get([f"of/{segment}"], [room.data_ptr()], [room.nbytes]) == [None]
            assert torch.equal(data, room)
        producer.remove_prefix("of/")
