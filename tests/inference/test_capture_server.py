"""Rows that really went from SGLang through Mooncake, against transformers."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
import requests
import torch

from specbatch.dispatch.messages import Fault
from specbatch.inference.capture_request import Captured, NotCaptured, new_capture_request
from specbatch.inference.capture_server import CONNECTIONS_LOST, CaptureServer, ContractBroken
from specbatch.inference.server import EngineError, ServerDied
from specbatch.pack_manifest import Manifest, claim_prefix, object_key
from tests.inference.lab import (
    ATTEMPT,
    CLAIMS,
    NAN_TOKEN,
    RUN,
    WIDTHS,
    Lab,
    capture,
    capture_rows,
    random_samples,
    schedulers,
    truth,
)

pytestmark = pytest.mark.light


def assert_true(rows: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Stored rows are float32 states rounded to bfloat16."""
    for name in WIDTHS:
        assert rows[name].shape == expected[name].shape
        # Half of bfloat16's last place, and what two float32 computations differ by.
        np.testing.assert_allclose(rows[name], expected[name], rtol=2**-8, atol=1e-4)
        rounded = torch.from_numpy(expected[name]).bfloat16().float().numpy()
        assert (rows[name] == rounded).mean() > 0.99


def stored(lab: Lab, results: dict[int, Captured | NotCaptured], sample: int) -> dict[str, np.ndarray]:
    result = results[sample]
    assert isinstance(result, Captured), result
    return lab.read(result)


@pytest.mark.parametrize("cut", ["whole", "chunked"])
def test_rows_are_those_of_transformers_for_every_chunking(
    cut: str, request: pytest.FixtureRequest, lab: Lab, reference: torch.nn.Module
) -> None:
    samples = random_samples([1, 127, 128, 129, 256, 1000])
    results = capture(request.getfixturevalue(cut), samples)
    for i, sample in enumerate(samples):
        assert_true(stored(lab, results, i), truth(reference, sample))


def test_an_engine_answers_nobody_without_its_key_which_no_other_user_can_see(chunked: CaptureServer) -> None:
    payload = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 1}}
    assert requests.post(chunked.server.url + "/generate", json=payload, timeout=30).status_code == 401
    wrong = {"Authorization": "Bearer guessed"}
    assert requests.post(chunked.server.url + "/flush_cache", headers=wrong, timeout=30).status_code == 401
    key = chunked.server._key
    seen = [word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or ()]
    assert key not in " ".join(seen)
    assert chunked.server.log.stat().st_mode & 0o777 == 0o600
    assert key not in chunked.server.log_tail(10_000)


def test_a_sample_is_stored_in_the_chunks_of_its_prefill(chunked: CaptureServer) -> None:
    samples = random_samples([1000])
    result = capture(chunked, samples)[0]
    assert isinstance(result, Captured)
    for name in WIDTHS:
        chunks = [chunk for chunk in result.chunks if chunk.tensor == name]
        assert len(chunks) > 1
        ends = [chunk.first_token + chunk.rows for chunk in chunks]
        assert [chunk.first_token for chunk in chunks] == [0, *ends[:-1]]
        assert ends[-1] == 1000


def test_samples_sent_together_equal_samples_sent_alone(whole: CaptureServer, lab: Lab) -> None:
    samples = random_samples(np.linspace(5, 400, 32).astype(int).tolist())
    together = capture(whole, samples)
    again = capture(whole, samples[::-1])
    for i in (0, 7, 16, 31):
        alone = stored(lab, capture(whole, [samples[i]]), 0)
        for other in (stored(lab, together, i), stored(lab, again, 31 - i)):
            for name in WIDTHS:
                np.testing.assert_array_equal(other[name], alone[name])


def test_only_the_wanted_rows_are_stored(chunked: CaptureServer, lab: Lab, reference: torch.nn.Module) -> None:
    sample = random_samples([400])[0]
    rows = {"aux": np.arange(290), "last": np.array([3, 4, 5, 126, 127, 128, 260, 289])}
    result = capture_rows(chunked, [sample], [rows], claim=CLAIMS.new())[0]
    assert isinstance(result, Captured)
    expected = truth(reference, sample)
    assert_true(lab.read(result), {name: expected[name][rows[name]] for name in WIDTHS})


def test_the_rows_lie_where_the_manifest_says(whole: CaptureServer, lab: Lab) -> None:
    claim = CLAIMS.new()
    samples = random_samples([40])
    rows = [{name: np.arange(40) for name in WIDTHS}]
    result = capture_rows(whole, samples, rows, claim=claim)[0]
    assert isinstance(result, Captured)
    keys = {object_key(RUN, ATTEMPT, Manifest(claim, (0, claim), ()), chunk) for chunk in result.chunks}
    assert keys == {f"{claim_prefix(RUN, ATTEMPT, (0, claim), claim)}0/{name}/0" for name in WIDTHS}
    assert lab.store.remove_prefix(claim_prefix(RUN, ATTEMPT, (0, claim), claim)) == 2


def test_rows_that_are_not_finite_are_not_stored_and_their_neighbours_are(whole: CaptureServer, lab: Lab) -> None:
    samples = random_samples([30, 30, 30])
    samples[1][17] = NAN_TOKEN
    results = capture(whole, samples)
    assert isinstance(results[1], NotCaptured)
    assert "not finite" in results[1].why
    assert results[1].fault is Fault.PACK
    for i in (0, 2):
        assert np.isfinite(stored(lab, results, i)["last"]).all()


def test_a_sample_longer_than_the_context_is_refused_and_the_engine_lives(whole: CaptureServer) -> None:
    results = capture(whole, random_samples([3000]))
    assert isinstance(results[0], NotCaptured)
    assert "context" in results[0].why
    assert isinstance(capture(whole, random_samples([8]))[0], Captured)


def test_a_request_that_was_changed_on_its_way_is_not_stored(whole: CaptureServer) -> None:
    sent, other = random_samples([20]), random_samples([21])
    claim = CLAIMS.new()
    request = new_capture_request(claim, (0, claim), 0, "", other[0], {name: np.arange(20) for name in WIDTHS})
    whole.send([request], sent)
    result = whole.results(30.0)[0]
    assert isinstance(result, NotCaptured)
    assert "other tokens" in result.why


def cut_connections(server: CaptureServer) -> int:
    """Shut down what this process has open to a server, as a network that loses connections would; how many it had."""
    port, done = urlsplit(server.server.url).port, 0
    for connection in psutil.Process().net_connections("tcp4"):
        if connection.status == psutil.CONN_ESTABLISHED and connection.raddr.port == port:
            with socket.socket(fileno=os.dup(connection.fd)) as copy:
                copy.shutdown(socket.SHUT_RDWR)
            done += 1
    return done


def lose_connection(server: CaptureServer) -> NotCaptured:
    """Send a sample to an engine that stands still, cut the connection, let it go on; what becomes of the sample."""
    (scheduler,) = schedulers(server.server.log.parent)
    claim, (sample,) = CLAIMS.new(), random_samples([40])
    scheduler.suspend()
    try:
        server.send(
            [new_capture_request(claim, (0, claim), 5, "", sample, {name: np.arange(40) for name in WIDTHS})], [sample]
        )
        until = time.monotonic() + 20
        while not cut_connections(server):
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        scheduler.resume()
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for result in server.results(0.2):
            if isinstance(result, NotCaptured) and result.claim == claim:
                return result
    raise AssertionError("nothing was said of it")


def test_a_broken_connection_costs_its_claim_and_not_the_engine_unless_it_goes_on(
    whole: CaptureServer, lab: Lab, reference: torch.nn.Module
) -> None:
    for _ in range(CONNECTIONS_LOST):
        lost = lose_connection(whole)
        assert (lost.sample, lost.fault) == (5, Fault.OTHER), "of one sample: the claim is given back"
        assert "a connection to the healthy engine broke" in lost.why
    lost = lose_connection(whole)
    assert (lost.sample, lost.fault) == (None, Fault.OTHER), "of none: the engine is started again"
    (sample,) = random_samples([60])
    assert_true(stored(lab, capture(whole, [sample]), 0), truth(reference, sample))
    assert lose_connection(whole).sample == 5, "after an answer it is counted anew"


def test_requests_without_an_order_are_none_of_ours(whole: CaptureServer) -> None:
    whole.server.generate({"input_ids": [[1, 2, 3]], "sampling_params": {"max_new_tokens": 2}})
    assert whole.results(0.5) == []


def test_rows_wait_for_room_in_the_store_and_are_given_up_in_the_end(whole: CaptureServer, lab: Lab) -> None:
    lab.store.remove_prefix(f"{RUN}/{ATTEMPT}/")
    block = lab.memory[: 15 << 20]
    keys = [f"{RUN}/{ATTEMPT}/block/{i}" for i in range(4)]
    lab.store.put(keys, [block.data_ptr()] * 4, [block.nbytes] * 4)
    full = capture(whole, random_samples([1990] * 8))
    lab.store.remove(keys)
    free = capture(whole, random_samples([1990] * 4))
    failed = [result for result in full.values() if isinstance(result, NotCaptured)]
    assert failed
    assert all(result.fault is Fault.FULL and "no room" in result.why for result in failed)
    assert all(isinstance(result, Captured) for result in free.values())


def test_an_engine_without_the_plugin_is_refused(start: Callable[..., CaptureServer]) -> None:
    server = start()
    server.server.environment["SGLANG_PLUGINS"] = "another"
    with pytest.raises(EngineError, match="plugin did not answer"), server:
        pass


def test_the_plugin_refuses_arguments_that_would_break_the_capture(start: Callable[..., CaptureServer]) -> None:
    server = start()
    del server.server.arguments["disable_radix_cache"]
    with pytest.raises(ServerDied, match="disable_radix_cache must be True"), server:
        pass


def test_an_engine_that_gives_out_another_layer_is_refused_for_good(start: Callable[..., CaptureServer]) -> None:
    server = start()
    server.server.arguments["return_aux_hidden_state_layer_ids"] = [0, 1, 4]
    with pytest.raises(ContractBroken, match=r"LlamaForCausalLM .* layer 2 .* relative difference") as error, server:
        pass
    assert not isinstance(error.value, EngineError), "no restart would help"


def test_the_last_layer_cannot_be_captured_and_the_engine_says_so(start: Callable[..., CaptureServer]) -> None:
    server = start()
    server.server.arguments["return_aux_hidden_state_layer_ids"] = [0, 2, 5]
    with pytest.raises(ServerDied, match="layer"), server:
        pass
