"""Messages reach the other end, whole, in order, and only if they are authentic."""

from __future__ import annotations

import re
import threading
from typing import Any

import msgspec
import pytest
import zmq

from sglang_dualpath.control.auth import TO_SERVER, Authenticator
from sglang_dualpath.control.loop import ControlErrorKind
from sglang_dualpath.protocol import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Bye,
    Cancel,
    Hello,
    NoOffer,
    NoOfferReason,
    Queued,
    encode,
)
from tests.control.ends import KEY, Ends, wait_for
from tests.protocol.strategies import MESSAGE_TYPES, example


@pytest.fixture
def raw() -> Any:
    """A bare DEALER, for what a well-behaved client never sends."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.ROUTING_ID, b"raw")
    socket.set(zmq.RCVTIMEO, 10_000)
    yield socket
    context.destroy(linger=0)


def signed(payload: bytes) -> list[bytes]:
    return [payload, Authenticator(KEY).sign(payload, direction=TO_SERVER, engine=b"raw")]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
@pytest.mark.parametrize("key", [KEY, None])
def test_a_message_and_its_answer_arrive(ends: Ends, host: str, key: bytes | None) -> None:
    server, prefill = ends.server(host, key=key)
    client, decode = ends.client(key=key)
    assert client.send(server.endpoint, example(Hello))
    wait_for(lambda: prefill.messages)
    assert prefill.messages == [(b"decode-1", example(Hello))]
    assert server.send(b"decode-1", Queued(room=7, reason="busy"))
    wait_for(lambda: decode.messages)
    assert decode.messages == [(server.endpoint, Queued(room=7, reason="busy"))]
    assert not prefill.errors
    assert not decode.errors


def test_the_endpoint_is_an_address_to_connect_to(ends: Ends) -> None:
    server, _ = ends.server("::1")
    assert re.fullmatch(r"tcp://\[::1\]:\d+", server.endpoint)


def test_every_type_travels_in_order(ends: Ends) -> None:
    server, prefill = ends.server()
    client, _ = ends.client()
    for struct in MESSAGE_TYPES:
        client.send(server.endpoint, example(struct))
    wait_for(lambda: len(prefill.messages) == len(MESSAGE_TYPES))
    assert [type(message) for _, message in prefill.messages] == list(MESSAGE_TYPES)


def test_many_threads_may_send_at_once(ends: Ends) -> None:
    server, prefill = ends.server()
    client, _ = ends.client()
    threads = [
        threading.Thread(
            target=lambda room=room: [client.send(server.endpoint, Bye(room=room, attempt=i)) for i in range(100)]
        )
        for room in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: len(prefill.messages) == 800)
    for room in range(8):
        attempts = [message.attempt for _, message in prefill.messages if message.room == room]
        assert attempts == list(range(100))


def test_two_engines_are_told_apart(ends: Ends) -> None:
    server, prefill = ends.server()
    first, first_record = ends.client("decode-1")
    second, second_record = ends.client("decode-2")
    first.send(server.endpoint, Bye(room=1, attempt=0))
    second.send(server.endpoint, Bye(room=2, attempt=0))
    wait_for(lambda: len(prefill.messages) == 2)
    assert {peer: message.room for peer, message in prefill.messages} == {b"decode-1": 1, b"decode-2": 2}
    server.send(b"decode-2", Cancel(room=2, attempt=0))
    wait_for(lambda: second_record.messages)
    assert not first_record.messages


def test_one_client_talks_to_two_servers(ends: Ends) -> None:
    (one, one_record), (two, two_record) = ends.server(), ends.server()
    client, _ = ends.client()
    client.send(one.endpoint, Bye(room=1, attempt=0))
    client.send(two.endpoint, Bye(room=2, attempt=0))
    wait_for(lambda: one_record.messages and two_record.messages)
    assert [m.room for _, m in one_record.messages] == [1]
    assert [m.room for _, m in two_record.messages] == [2]


@pytest.mark.parametrize(("server_key", "client_key"), [(KEY, b"another key of some length"), (KEY, None), (None, KEY)])
def test_messages_under_another_key_are_dropped_and_counted(
    ends: Ends, server_key: bytes | None, client_key: bytes | None
) -> None:
    server, prefill = ends.server(key=server_key)
    client, _ = ends.client(key=client_key)
    client.send(server.endpoint, Bye(room=1, attempt=0))
    wait_for(lambda: prefill.errors)
    assert prefill.errors == {ControlErrorKind.AUTHENTICATION: 1}
    assert not prefill.messages


def test_the_client_drops_answers_under_another_key(ends: Ends) -> None:
    server, prefill = ends.server(key=KEY)
    client, decode = ends.client(key=None)
    client.send(server.endpoint, Bye(room=1, attempt=0))
    wait_for(lambda: prefill.errors)
    server.send(b"decode-1", Queued(room=1, reason=""))
    wait_for(lambda: decode.errors)
    assert decode.errors == {ControlErrorKind.AUTHENTICATION: 1}
    assert not decode.messages


BYE = encode(Bye(room=1, attempt=0))


@pytest.mark.parametrize(
    ("frames", "kind"),
    [
        ([BYE, b""], ControlErrorKind.AUTHENTICATION),
        ([BYE, signed(BYE)[1][:16]], ControlErrorKind.AUTHENTICATION),
        ([BYE], ControlErrorKind.MALFORMED),
        ([b"a", b"b", b"c", b"d"], ControlErrorKind.MALFORMED),
        ([b""], ControlErrorKind.MALFORMED),
        (signed(b"not msgpack"), ControlErrorKind.MALFORMED),
        (signed(msgspec.msgpack.encode({"t": "bye", "room": -1, "attempt": 0})), ControlErrorKind.MALFORMED),
    ],
    ids=["no mac", "half a mac", "mac frame missing", "too many frames", "empty", "garbage", "out of range"],
)  # fmt: skip
def test_what_is_no_message_is_dropped_counted_and_forgotten(
    ends: Ends, raw: zmq.Socket[bytes], frames: list[bytes], kind: ControlErrorKind
) -> None:
    server, prefill = ends.server()
    raw.connect(server.endpoint)
    raw.send_multipart(frames)
    raw.send_multipart(signed(encode(Bye(room=9, attempt=0))))
    wait_for(lambda: prefill.messages)
    assert prefill.messages == [(b"raw", Bye(room=9, attempt=0))]
    assert prefill.errors == {kind: 1}


def test_an_oversized_frame_never_reaches_the_handler(ends: Ends, raw: zmq.Socket[bytes]) -> None:
    server, prefill = ends.server()
    raw.connect(server.endpoint)
    raw.send_multipart(signed(b"x" * (MAX_MESSAGE_BYTES + 1)))
    client, _ = ends.client()
    client.send(server.endpoint, Bye(room=9, attempt=0))
    wait_for(lambda: prefill.messages)
    assert prefill.messages == [(b"decode-1", Bye(room=9, attempt=0))]


def test_a_hello_of_an_unreadable_version_is_answered(ends: Ends, raw: zmq.Socket[bytes]) -> None:
    server, prefill = ends.server()
    raw.connect(server.endpoint)
    hello = msgspec.msgpack.encode({"t": "hello", "room": 5, "version": PROTOCOL_VERSION + 1, "package": {}})
    raw.send_multipart(signed(hello))
    answer = raw.recv_multipart()[0]
    assert answer == encode(NoOffer(room=5, reason=NoOfferReason.VERSION))
    assert prefill.errors == {ControlErrorKind.VERSION: 1}


@pytest.mark.parametrize(
    "frames", [[b"garbage", b""], [b"one frame"], [b"a", b"b", b"c"]], ids=["garbage", "one frame", "three frames"]
)
def test_the_client_drops_what_is_no_message(ends: Ends, frames: list[bytes]) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        router = context.socket(zmq.ROUTER)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        client, decode = ends.client(key=None)
        client.send(f"tcp://127.0.0.1:{port}", Bye(room=1, attempt=0))
        peer = router.recv_multipart()[0]
        router.send_multipart([peer, *frames])
        router.send_multipart([peer, b""])  # a probe, which is nothing to count
        router.send_multipart([peer, encode(Queued(room=1, reason="")), b""])
        wait_for(lambda: decode.messages)
        assert decode.errors == {ControlErrorKind.MALFORMED: 1}
        assert len(decode.messages) == 1
    finally:
        context.destroy(linger=0)


def test_a_message_out_of_range_is_not_sent(ends: Ends) -> None:
    server, prefill = ends.server()
    client, decode = ends.client()
    assert not client.send(server.endpoint, Bye(room=-1, attempt=0))
    assert not server.send(b"decode-1", Cancel(room=-1, attempt=0))
    assert decode.errors == {ControlErrorKind.ENCODE: 1}
    assert prefill.errors == {ControlErrorKind.ENCODE: 1}
