"""The dispatcher's server and client, over the loopback interface and with their real encryption."""

from __future__ import annotations

import contextlib
import threading
import time

import msgspec
import pytest

from specbatch.dispatch.client import Client, DispatcherGone, DispatcherRefused
from specbatch.dispatch.connection_file import Keys
from specbatch.dispatch.messages import LONG_POLL_S, Phase
from tests.dispatch.cluster import manifest_of
from tests.dispatch.heads import Head, join_all, make_head


def test_engines_and_ranks_train_everything_from_threads_of_their_own(head: Head, client: Client):
    join_all(client)
    trained: list[tuple[int, int]] = []

    def engine(name: str) -> None:
        while (claims := client.claim(name, 4)).phase is Phase.WORK:
            client.stored(name, [manifest_of(head.plan, granted) for granted in claims.granted])
            client.heartbeat(name, [], "ready")

    def rank(number: int) -> None:
        for step in range(1, head.plan.steps + 1):
            wanted = {pack.id for pack in head.plan.assign(step, 2)[number]}
            while wanted:
                wanted -= {manifest.pack for manifest in client.wait(number, sorted(wanted)).stored}
            while not client.begin(number, step).go:
                pass
            client.trained(number, step)
            trained.append((number, step))

    threads = [threading.Thread(target=engine, args=(name,)) for name in "abc"]
    threads += [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(trained) == [(number, step) for number in (0, 1) for step in range(1, head.plan.steps + 1)]
    report = client.status()
    assert report.phase is Phase.TRAINED
    assert report == msgspec.structs.replace(head.server.report(), engines=report.engines)
    assert {"joined", "stored"} <= {name for name, _ in head.events}


def test_a_long_poll_is_answered_on_the_change_it_waits_for(head: Head, client: Client):
    answered: list[float] = []

    def claim() -> None:
        while not client.claim("a", 1).granted:
            pass
        answered.append(time.monotonic())

    thread = threading.Thread(target=claim)
    thread.start()
    time.sleep(0.2)
    joined = time.monotonic()
    join_all(client)
    thread.join(timeout=10)
    assert answered[0] - joined < LONG_POLL_S / 2


def test_a_long_poll_with_nothing_to_say_ends(head: Head, client: Client):
    begun = time.monotonic()
    assert client.claim("a", 1).granted == ()
    assert LONG_POLL_S * 0.9 < time.monotonic() - begun < LONG_POLL_S + 3


def test_a_heartbeat_is_not_held_up_by_long_polls_of_other_threads(head: Head, client: Client):
    thread = threading.Thread(target=client.claim, args=("a", 1))
    thread.start()
    begun = time.monotonic()
    client.heartbeat("a", [], "ready")
    assert time.monotonic() - begun < LONG_POLL_S / 2
    thread.join()


def test_a_claim_asked_again_is_granted_once(head: Head, client: Client):
    """The first asker is gone: a pack that is granted to it would never be computed."""
    impatient = Client(head.rendezvous, deadline_s=0.3)
    with pytest.raises(DispatcherGone):
        impatient.claim("a", 2)
    impatient.close()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(client.claim("a", 2)))
    thread.start()
    time.sleep(0.2)
    join_all(client)
    thread.join(timeout=10)
    assert len(answers[0].granted) == 2
    assert client.status().claimed == 2


def test_drain_from_the_head_reaches_everybody(head: Head, client: Client):
    join_all(client)
    head.server.drain("signal 15")
    assert client.begin(0, 1).phase is Phase.STOP
    assert client.status().why == "signal 15"


def test_a_client_does_not_talk_to_another_attempts_server(head: Head):
    misled = Client(msgspec.structs.replace(head.rendezvous, server_public=Keys.new().server_public), deadline_s=0.5)
    with pytest.raises(DispatcherGone):
        misled.status()
    misled.close()


def test_a_request_that_makes_no_sense_raises_at_its_sender(head: Head, client: Client):
    with pytest.raises(DispatcherRefused, match="has to join"):
        client.begin(0, 1)


def test_a_server_that_is_gone_is_an_error_after_the_deadline(head: Head):
    client = Client(head.rendezvous, deadline_s=0.5)
    client.status()
    head.server.stop()
    begun = time.monotonic()
    with pytest.raises(DispatcherGone, match=r"did not answer trained within"):
        client.trained(0, 1)
    assert time.monotonic() - begun < 3
    client.close()


def test_closing_a_client_ends_the_requests_of_other_threads(head: Head):
    client, ended = Client(head.rendezvous), threading.Event()

    def claim() -> None:
        with contextlib.suppress(DispatcherGone):
            while True:
                client.claim("a", 1)
        ended.set()

    threading.Thread(target=claim, daemon=True).start()
    time.sleep(0.2)
    client.close()
    assert ended.wait(5)


def test_garbage_is_removed_even_if_the_store_does_not_answer_at_first(head: Head, client: Client):
    join_all(client)
    head.remove_errors = 1
    granted = client.claim("a", 1).granted[0]
    client.failed("a", granted.claim, "broken")
    assert head.removal.wait(10)
    assert head.removed == [f"ab/3/{granted.pack[0]}.{granted.pack[1]}/{granted.claim}/"]


def test_events_that_cannot_be_written_end_nothing(head: Head, client: Client):
    head.event_errors = 2
    join_all(client)
    assert client.claim("a", 1).granted
    until = time.monotonic() + 10
    while "joined" not in {name for name, _ in head.events}:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_two_servers_live_side_by_side():
    first, second = make_head(), make_head()
    with first.server, second.server:
        assert first.server.port != second.server.port
        for made in (first, second):
            client = Client(made.rendezvous)
            assert client.status().steps == made.plan.steps
            client.close()
