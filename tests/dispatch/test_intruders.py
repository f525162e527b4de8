"""Strangers and invalid requests are refused and counted, without an effect on others."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specbatch.dispatch.client import Client, DispatcherGone
from specbatch.dispatch.connection_file import Keys
from specbatch.dispatch.encoding import CUT_OFF_BYTES, MAX_MESSAGE_BYTES, encode
from specbatch.dispatch.messages import (
    Answer,
    AnyRequest,
    Launch,
    Phase,
    Refusals,
    StatusRequest,
)
from specbatch.pack_manifest import Chunk, Manifest
from tests.dispatch.heads import Head, join_all, make_head

pytestmark = pytest.mark.light


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Head]:
    """A server that gets whatever comes to hypothesis' mind."""
    made = make_head()
    with made.server:
        yield made


def address(head: Head) -> tuple[str, int]:
    return "127.0.0.1", head.rendezvous.dispatcher_port


def raw_socket(head: Head, context: zmq.Context, kind: int = zmq.REQ) -> zmq.Socket:
    """A peer that has the attempt's key."""
    raw = context.socket(kind)
    raw.linger = 0
    raw.curve_serverkey = head.rendezvous.server_public.encode()
    raw.curve_publickey = head.rendezvous.client_public.encode()
    raw.curve_secretkey = head.rendezvous.client_secret.encode()
    raw.connect(f"tcp://127.0.0.1:{head.rendezvous.dispatcher_port}")
    return raw


def wait_for(head: Head, seen: Callable[[Refusals], bool]) -> None:
    until = time.monotonic() + 10
    while not seen(head.server.report().refused):
        assert time.monotonic() < until, head.server.report().refused
        time.sleep(0.01)


# Peers


def test_the_key_of_another_attempt_is_refused_and_counted(head: Head, client: Client):
    other = Keys.new()
    stranger = Client(
        msgspec.structs.replace(head.rendezvous, client_public=other.client_public, client_secret=other.client_secret),
        deadline_s=0.5,
    )
    with pytest.raises(DispatcherGone, match="did not answer status"):
        stranger.status()
    stranger.close()
    wait_for(head, lambda refused: refused.peers >= 1)
    assert client.status().phase is Phase.WORK
    assert client.status().refused.requests == 0


def test_a_peer_without_any_key_is_refused_and_counted(head: Head, client: Client):
    with zmq.Context() as context, context.socket(zmq.REQ) as stranger:
        stranger.linger = 0
        stranger.connect(f"tcp://127.0.0.1:{head.rendezvous.dispatcher_port}")
        stranger.send(encode(_drain()))
        wait_for(head, lambda refused: refused.peers + refused.left >= 1)  # it may see first that they differ
        assert not stranger.poll(100)
    assert client.status().phase is Phase.WORK


def test_noise_on_the_port_is_counted_and_disturbs_nobody(head: Head, client: Client):
    for noise in (b"GET / HTTP/1.1\r\n\r\n" * 100, b"\xff" * 4096, bytes(64)):
        with socket.create_connection(address(head)) as connection:
            connection.sendall(noise)
            assert client.status().phase is Phase.WORK
    wait_for(head, lambda refused: refused.peers >= 1)


def test_who_leaves_before_saying_who_it_is_was_not_refused(head: Head, client: Client):
    for begun in (b"", b"\xff" + bytes(8) + b"\x7f"):
        with socket.create_connection(address(head)) as connection:
            connection.sendall(begun)
    other = Client(head.rendezvous, deadline_s=0.5)
    other.close()
    for _ in range(5):
        assert client.status().refused.peers == 0
        time.sleep(0.05)


def test_what_was_recorded_on_the_wire_is_refused_when_it_comes_again(head: Head, client: Client):
    with Eavesdropper(address(head)) as wire:
        drained = Client(msgspec.structs.replace(head.rendezvous, dispatcher_port=wire.port))
        join_all(drained)
        drained.close()
        recorded = wire.heard()
    assert len(recorded) > 500
    until = time.monotonic() + 10
    while len(head.events) < 3:  # a world, and two that joined
        assert time.monotonic() < until
        time.sleep(0.01)
    with socket.create_connection(address(head)) as replay:
        replay.sendall(recorded)
        wait_for(head, lambda refused: refused.peers >= 1)
    assert client.status().ranks == 2
    assert len(head.events) == 3


# Messages of peers that are let in


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"kind": "claim"}),
        msgspec.msgpack.encode({"kind": "nonsense"}),
        b"\x81\xa4kind\xa6\xff\xff\xff\xff\xff\xff",
        b"\x82\xa1x" + b"\x91" * 200_000,
        None,
    ],
    ids=["empty", "no msgpack", "incomplete", "unknown", "no UTF-8", "lists in lists", "too long"],
)
def test_what_is_no_request_is_refused_and_counted(head: Head, client: Client, message: bytes | None):
    if message is None:
        message = b"\0" * (MAX_MESSAGE_BYTES + 1)
    with zmq.Context() as context, raw_socket(head, context) as raw:
        raw.send(message)
        assert raw.poll(10_000)
        assert msgspec.msgpack.decode(raw.recv())["kind"] == "refused"
    assert client.status().refused == Refusals(messages=1)
    assert client.status().phase is Phase.WORK


def test_a_message_far_too_long_is_refused_and_counted_while_others_are_answered(
    head: Head, client: Client, caplog: pytest.LogCaptureFixture
):
    answered: list[float] = []
    with zmq.Context() as context, raw_socket(head, context) as raw:
        raw.send(bytes(CUT_OFF_BYTES // 2))
        while not raw.poll(0):
            begun = time.monotonic()
            assert client.status().phase is Phase.WORK
            answered.append(time.monotonic() - begun)
        assert msgspec.msgpack.decode(raw.recv())["kind"] == "refused"
    assert len(answered) > 3
    assert max(answered) < 5
    assert client.status().refused == Refusals(messages=1)
    assert "134217733 bytes are more than 16777216" in caplog.text, "with its peer's name"


def test_a_message_that_nobody_has_memory_for_ends_its_connection_and_no_other(head: Head, client: Client):
    with (
        zmq.Context() as context,
        raw_socket(head, context) as raw,
        raw.get_monitor_socket(zmq.EVENT_DISCONNECTED) as cut,
    ):
        raw.send(bytes(CUT_OFF_BYTES + 1))
        assert cut.poll(30_000)
        assert not raw.poll(0)
    assert client.status().phase is Phase.WORK


@pytest.mark.parametrize(
    "frames", [[b""], [encode(StatusRequest())], [b"x", encode(StatusRequest())], [b"", b"", encode(StatusRequest())]],
    ids=["empty", "no delimiter", "no empty delimiter", "too many"],
)  # fmt: skip
def test_a_message_of_other_parts_is_refused_and_counted(head: Head, client: Client, frames: list[bytes]):
    with zmq.Context() as context, raw_socket(head, context, zmq.DEALER) as raw:
        raw.send_multipart(frames)
        assert raw.poll(10_000)
        assert msgspec.msgpack.decode(raw.recv_multipart()[-1])["kind"] == "refused"
    assert client.status().refused == Refusals(messages=1)


def test_a_message_whose_parts_together_are_too_long_is_refused_and_counted(head: Head, client: Client):
    with zmq.Context() as context, raw_socket(head, context, zmq.DEALER) as raw:
        raw.send_multipart([bytes(MAX_MESSAGE_BYTES), b"", encode(StatusRequest())])
        assert raw.poll(10_000)
        assert [len(frame) for frame in raw.recv_multipart()][:-1] == [0], "its parts are not sent back"
    assert client.status().refused == Refusals(messages=1)


NUMBERS = st.one_of(st.integers(-3, 9), st.sampled_from([-(2**63), 2**63, 2**64 - 1]))
PACKS = st.tuples(NUMBERS, NUMBERS)
NAMES = st.one_of(st.sampled_from(["a", "", "x" * 5000]), st.text(max_size=9))
ANYTHING = st.dictionaries(NAMES, st.none() | NUMBERS | NAMES, max_size=3)
FIELDS = {
    int: NUMBERS,
    str: NAMES,
    float: st.floats(),
    tuple[int, ...]: st.lists(NUMBERS, max_size=4).map(tuple),
    tuple[int, int]: PACKS,
    tuple[tuple[int, int], ...]: st.lists(PACKS, max_size=4).map(tuple),
    tuple[Manifest, ...]: st.lists(
        st.builds(
            Manifest,
            NUMBERS,
            PACKS,
            st.lists(st.builds(Chunk, NUMBERS, NAMES, NUMBERS, NUMBERS, NUMBERS, NAMES), max_size=3).map(tuple),
        ),
        max_size=2,
    ).map(tuple),
    tuple[Answer, ...]: st.lists(
        st.builds(
            Answer, NUMBERS, PACKS, st.binary(max_size=9), NAMES, NAMES, st.lists(NAMES, max_size=2).map(tuple), NUMBERS
        ),
        max_size=2,
    ).map(tuple),
    Launch | None: st.none() | st.builds(Launch, NAMES, NAMES, ANYTHING, st.just({}), st.just({}), NUMBERS),
}


def _requests() -> st.SearchStrategy[bytes]:
    """Every kind of request, with any values of the right types."""
    kinds = []
    for kind in AnyRequest.__args__:
        fields = {
            field.name: FIELDS[field.type] if field.type in FIELDS else st.sampled_from(list(field.type))
            for field in msgspec.structs.fields(kind)
        }
        if kind.__name__ != "Drain":  # which is obeyed, and all others would be told so
            kinds.append(st.builds(kind, **fields))
    return st.one_of(kinds).map(encode)


def _drain() -> object:
    from specbatch.dispatch.messages import Drain

    return Drain("a stranger says so")


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """A request with some bytes that are others, too many, or missing."""
    message = bytearray(draw(_requests()))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(message)))
        message[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(message)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(st.binary(max_size=200), _requests(), spoiled()), min_size=1, max_size=20))
def test_whatever_a_known_peer_sends_is_answered_or_counted_and_the_server_lives(fuzzed: Head, messages: list[bytes]):
    with zmq.Context() as context, raw_socket(fuzzed, context, zmq.DEALER) as raw:
        for message in messages:
            raw.send_multipart([b"", message])
        for _ in messages:
            # Long polls are answered late, and one that comes again takes the place of the first.
            if not raw.poll(0 if raw.poll(20) else 20):
                break
            assert "kind" in msgspec.msgpack.decode(raw.recv_multipart()[-1])
    before = fuzzed.server.report().refused
    with zmq.Context() as context, raw_socket(fuzzed, context) as raw:
        raw.send(b"\xc1")
        assert raw.poll(10_000)
    assert fuzzed.server.report().refused.messages > before.messages


class Eavesdropper:
    """Sits between a client and the server, and hears what the client says. A context manager."""

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._heard: list[bytearray] = []
        self._open: list[socket.socket] = [self._listener]

    def __enter__(self) -> Eavesdropper:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for opened in self._open:
            opened.close()

    def heard(self) -> bytes:
        """Everything that the first connection sent."""
        return bytes(self._heard[0])

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server, said = socket.create_connection(self._server), bytearray()
            self._open += [client, server]
            self._heard.append(said)
            threading.Thread(target=_pass_on, args=(client, server, said), daemon=True).start()
            threading.Thread(target=_pass_on, args=(server, client, bytearray()), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket, said: bytearray) -> None:
    try:
        while data := source.recv(65536):
            said += data
            target.sendall(data)
    except OSError:
        return
