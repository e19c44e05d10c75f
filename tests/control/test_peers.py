"""What happens when the other end dies, freezes, restarts or does not read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from sglang_dualpath.control.loop import HIGH_WATER_MARK, ControlErrorKind
from sglang_dualpath.protocol import MAX_GRANT_PAGES, Bye, Cancel, Fail, Grant, Queued
from tests.control.ends import KEY, Ends, port_of, wait_for

LARGE_GRANT = Grant(
    room=1,
    attempt=0,
    request_id=0,
    claim_id=0,
    first_page=0,
    slots=tuple(range(MAX_GRANT_PAGES)),
    memory=False,
    lease_s=1,
)

_CHILD = """
import sys, time
from sglang_dualpath.control import ControlClient
from sglang_dualpath.protocol import Bye
client = ControlClient("child", sys.argv[2].encode(), lambda *_: None, lambda kind: None)
client.send(sys.argv[1], Bye(room=1, attempt=0))
time.sleep(60)
"""


class Child:
    """A client in a process of its own, to be frozen or killed."""

    def __init__(self, endpoint: str) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen([sys.executable, "-c", _CHILD, endpoint, KEY.decode()], env=environment)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def children() -> Iterator[list[Child]]:
    children: list[Child] = []
    yield children
    for child in children:
        child.kill()


def test_a_killed_peer_is_reported_gone_after_the_grace(ends: Ends, children: list[Child]) -> None:
    server, prefill = ends.server(gone_grace_s=0.5)
    children.append(Child(server.endpoint))
    wait_for(lambda: prefill.messages)
    children[0].kill()
    killed_s = time.monotonic()
    server.send(b"child", Cancel(room=1, attempt=0))
    while not prefill.gone and time.monotonic() < killed_s + 10:
        server.send(b"child", Cancel(room=1, attempt=0))  # the first may have gone into a connection about to close
        time.sleep(0.01)
    assert prefill.gone == [b"child"]
    assert time.monotonic() - killed_s >= 0.5


def test_a_frozen_peer_is_not_gone(ends: Ends, children: list[Child]) -> None:
    server, prefill = ends.server(gone_grace_s=0.1)
    children.append(Child(server.endpoint))
    wait_for(lambda: prefill.messages)
    children[0].signal(signal.SIGSTOP)
    try:
        for _ in range(20):
            server.send(b"child", Cancel(room=1, attempt=0))
            time.sleep(0.05)
        assert not prefill.gone
        assert not prefill.errors
    finally:
        children[0].signal(signal.SIGCONT)


def test_a_peer_that_was_never_there_is_gone(ends: Ends) -> None:
    server, prefill = ends.server(gone_grace_s=0.1)
    assert server.send(b"nobody", Cancel(room=1, attempt=0))
    wait_for(lambda: prefill.gone)
    time.sleep(0.3)
    assert prefill.gone == [b"nobody"]
    assert prefill.errors == {ControlErrorKind.UNREACHABLE: 1}


def test_a_peer_that_reconnects_within_the_grace_is_not_gone(ends: Ends) -> None:
    server, prefill = ends.server(gone_grace_s=3.0)
    client, decode = ends.client()
    client.send(server.endpoint, Bye(room=1, attempt=0))
    wait_for(lambda: prefill.messages)
    client.drop(server.endpoint)
    wait_for(lambda: server.send(b"decode-1", Cancel(room=1, attempt=0)) and prefill.errors)
    client.send(server.endpoint, Bye(room=2, attempt=0))
    wait_for(lambda: len(prefill.messages) == 2)
    server.send(b"decode-1", Cancel(room=2, attempt=0))
    wait_for(lambda: (server.endpoint, Cancel(room=2, attempt=0)) in decode.messages)
    time.sleep(0.2)
    assert server._unreachable_since_s == {}
    assert not prefill.gone


def test_without_a_gone_handler_nothing_is_kept(ends: Ends) -> None:
    server, prefill = ends.server(gone_grace_s=0.05, handler_gone=None)
    server.send(b"nobody", Cancel(room=1, attempt=0))
    wait_for(lambda: prefill.errors)
    wait_for(lambda: not server._unreachable_since_s)
    assert prefill.errors == {ControlErrorKind.UNREACHABLE: 1}


def test_the_client_reconnects_to_a_restarted_server(ends: Ends) -> None:
    server, before = ends.server()
    client, decode = ends.client()
    client.send(server.endpoint, Bye(room=1, attempt=0))
    wait_for(lambda: before.messages)
    server.close()
    restarted, after = ends.server(port=port_of(server))
    assert restarted.endpoint == server.endpoint
    client.send(restarted.endpoint, Bye(room=2, attempt=0))
    wait_for(lambda: after.messages)
    restarted.send(b"decode-1", Queued(room=2, reason=""))
    wait_for(lambda: decode.messages)
    assert not decode.errors


def test_messages_wait_for_a_server_that_starts_later(ends: Ends) -> None:
    server, _ = ends.server()
    server.close()
    client, _ = ends.client()
    assert client.send(server.endpoint, Bye(room=1, attempt=0))
    time.sleep(0.3)
    _, record = ends.server(port=port_of(server))
    wait_for(lambda: record.messages)


def test_a_server_that_never_answers_costs_a_bounded_queue(ends: Ends) -> None:
    server, _ = ends.server()
    server.close()
    client, decode = ends.client(queue_limit=10 * HIGH_WATER_MARK)
    start_s = time.monotonic()
    for attempt in range(HIGH_WATER_MARK + 50):
        assert client.send(server.endpoint, Bye(room=1, attempt=attempt))
    assert time.monotonic() - start_s < 2.0
    wait_for(lambda: decode.errors[ControlErrorKind.PEER_FULL] == 50)


def test_a_peer_that_does_not_read_costs_a_bounded_queue_and_is_not_gone(ends: Ends) -> None:
    server, prefill = ends.server(gone_grace_s=0.1, queue_limit=10 * HIGH_WATER_MARK)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        deaf = context.socket(zmq.DEALER)
        deaf.set(zmq.ROUTING_ID, b"deaf")
        deaf.set(zmq.RCVHWM, 1)
        deaf.connect(server.endpoint)
        deaf.send(b"")
        wait_for(lambda: prefill.errors[ControlErrorKind.MALFORMED])
        limit_s = time.monotonic() + 20
        while not prefill.errors[ControlErrorKind.PEER_FULL]:
            assert time.monotonic() < limit_s
            if not server.send(b"deaf", LARGE_GRANT):
                time.sleep(0.01)  # this thread was faster than the control thread
        server.send(b"deaf", LARGE_GRANT)
        time.sleep(0.3)
        assert not prefill.gone
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://", "tcp://127.0.0.1", ""])
def test_an_endpoint_that_is_no_address_is_counted(ends: Ends, endpoint: str) -> None:
    client, decode = ends.client()
    assert client.send(endpoint, Bye(room=1, attempt=0))
    wait_for(lambda: decode.errors)
    assert decode.errors == {ControlErrorKind.ENDPOINT: 1}


def test_dropping_an_unknown_endpoint_does_nothing(ends: Ends) -> None:
    server, prefill = ends.server()
    client, decode = ends.client()
    client.drop("tcp://127.0.0.1:1")
    client.send(server.endpoint, Bye(room=1, attempt=0))
    wait_for(lambda: prefill.messages)
    assert not decode.errors


def test_an_endpoint_may_be_dropped_by_the_handler_of_its_message(ends: Ends) -> None:
    server, _ = ends.server(handler=lambda peer, message: server.send(peer, Queued(room=message.room, reason="")))
    answered = threading.Event()

    def drop(endpoint: str, message: object) -> None:
        client.drop(endpoint)
        answered.set()

    client, decode = ends.client(handler=drop)
    for _ in range(3):
        answered.clear()
        client.send(server.endpoint, Fail(room=1, attempt=0, claim_id=0, reason=""))
        assert answered.wait(10)
    assert not decode.errors
