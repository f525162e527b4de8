"""A server of the dispatcher and a client of it, for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from specbatch.dispatch.client import Client
from tests.dispatch.heads import Head, make_head


@pytest.fixture
def head() -> Iterator[Head]:
    made = make_head()
    with made.server:
        yield made


@pytest.fixture
def client(head: Head) -> Iterator[Client]:
    made = Client(head.rendezvous)
    yield made
    made.close()
