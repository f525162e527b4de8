"""Messages as bytes for the wire, and how long they may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from specbatch.dispatch.messages import AnyReply, AnyRequest

_T = TypeVar("_T")

MAX_MESSAGE_BYTES = 16 << 20
"""Longer messages are refused; a manifest takes some 80 bytes per chunk."""
CUT_OFF_BYTES = 256 << 20
"""Longest message that is read, so that it can be refused with a reason and counted. ZeroMQ closes the
connection of a longer one without notice. Without a bound, one message could fill the memory of the head's node."""

encode = msgspec.msgpack.Encoder().encode
"""Encodes a request or reply for the wire."""
_requests: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest)
_replies: msgspec.msgpack.Decoder[AnyReply] = msgspec.msgpack.Decoder(AnyReply)


def decode_request(data: bytes) -> AnyRequest:
    """Decode and validate a request. Raises only `msgspec.DecodeError`, whatever the data."""
    return _decode(_requests.decode, data)


def decode_reply(data: bytes) -> AnyReply:
    """Decode and validate a reply. Raises the same as `decode_request`."""
    return _decode(_replies.decode, data)


def _decode(decode: Callable[[bytes], _T], data: bytes) -> _T:
    try:
        return decode(data)
    except (UnicodeDecodeError, RecursionError) as error:
        # msgspec accepts strings that are not UTF-8, and lists nested without limit.
        raise msgspec.DecodeError(f"{type(error).__name__}: {error}") from error
