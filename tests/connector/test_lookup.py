"""How a decode server finds control endpoints, remembers and forgets them."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

from sglang_dualpath.connector import directory
from sglang_dualpath.connector.directory import EndpointLookup
from tests.clock import Clock
from tests.connector.bootstrap import ENDPOINT, ROUTE, Bootstrap, engine, put
from tests.connector.conftest import Serve

# A connection that was accepted while the test's own aiohttp server shut down is found by the garbage collector only.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lookup(clock: Clock) -> Iterator[EndpointLookup]:
    lookup = EndpointLookup(clock)
    yield lookup
    lookup.close()


def find(lookup: EndpointLookup, address: str, **ranks: int) -> str | None:
    found: queue.Queue[str | None] = queue.Queue()
    lookup.find(address, **{"dp_rank": 0, "tp_rank": 0} | ranks, then=found.put)
    return found.get(timeout=10)


def at_once(lookup: EndpointLookup, address: str) -> list[str | None]:
    """What `then` was called with before `find` returned."""
    found: list[str | None] = []
    here = threading.get_ident()
    lookup.find(
        address,
        dp_rank=0,
        tp_rank=0,
        then=lambda endpoint: found.append(endpoint) if threading.get_ident() == here else None,
    )
    return found


def test_an_endpoint_is_found_whatever_proxy_the_environment_names(
    address: str, lookup: EndpointLookup, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(address, engine())
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # of no concern between servers of a cluster
    assert find(lookup, address) == ENDPOINT


def test_a_known_endpoint_is_given_at_once_and_asked_for_once(
    address: str, bootstrap: Bootstrap, lookup: EndpointLookup
) -> None:
    put(address, engine())
    assert find(lookup, address) == ENDPOINT
    assert at_once(lookup, address) == [ENDPOINT]
    assert bootstrap.asked == 1


def test_the_first_question_is_asked_off_the_callers_thread(address: str, lookup: EndpointLookup) -> None:
    put(address, engine())
    assert at_once(lookup, address) == []


def test_each_rank_has_its_own_endpoint(address: str, lookup: EndpointLookup) -> None:
    put(address, engine())
    put(address, engine("tcp://10.0.0.1:7001", dp_rank=1))
    assert find(lookup, address, dp_rank=1) == "tcp://10.0.0.1:7001"
    assert find(lookup, address) == ENDPOINT


def test_a_server_without_the_route_is_left_alone_for_a_while(
    serve: Serve, lookup: EndpointLookup, clock: Clock
) -> None:
    stock = Bootstrap()
    stock.answer = web.Response(status=404)
    address = serve(stock.app)
    assert find(lookup, address) is None
    clock.now_s += 29
    assert at_once(lookup, address) == [None]
    assert stock.asked == 1
    clock.now_s += 2
    find(lookup, address)
    assert stock.asked == 2


def test_a_server_that_gets_the_flag_later_is_found(
    address: str, bootstrap: Bootstrap, lookup: EndpointLookup, clock: Clock
) -> None:
    bootstrap.answer = web.Response(status=404)
    assert find(lookup, address) is None
    bootstrap.answer = None
    put(address, engine())
    clock.now_s += 31
    assert find(lookup, address) == ENDPOINT


def test_a_server_whose_engine_has_not_registered_is_asked_again_soon(
    address: str, bootstrap: Bootstrap, lookup: EndpointLookup, clock: Clock
) -> None:
    assert find(lookup, address) is None
    assert at_once(lookup, address) == [None]
    put(address, engine())
    clock.now_s += 1.1
    assert find(lookup, address) == ENDPOINT
    assert bootstrap.asked == 2


def test_a_rank_that_is_missing_does_not_hide_another_that_is_known(
    address: str, lookup: EndpointLookup, clock: Clock
) -> None:
    put(address, engine())
    assert find(lookup, address) == ENDPOINT
    assert find(lookup, address, tp_rank=1) is None
    assert find(lookup, address) == ENDPOINT


def test_a_server_that_is_not_up_is_asked_again_soon(lookup: EndpointLookup, clock: Clock) -> None:
    assert find(lookup, "127.0.0.1:1") is None
    assert at_once(lookup, "127.0.0.1:1") == [None]
    clock.now_s += 1.1
    assert at_once(lookup, "127.0.0.1:1") == []


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 500},
        {"text": ""},
        {"text": "no json"},
        {"text": "[]"},
        {"text": "null"},
        {"text": '"0.0"'},
        {"text": '{"0.0": 7}'},
        {"text": '{"0.0": null}'},
        {"text": '{"0.0": "http://10.0.0.1:7000"}'},
        {"text": '{"0.0": "tcp://' + "h" * 300 + '"}'},
        {"body": b"\xff\xff"},
        {"text": '{"0.0": "' + "x" * (1 << 20) + '"}'},
        {"text": "[" * 100_000},
    ],
    ids=lambda answer: repr(answer)[:40],
)
def test_a_bad_answer_is_no_endpoint_and_does_not_stay(
    address: str, bootstrap: Bootstrap, lookup: EndpointLookup, clock: Clock, answer: dict[str, Any]
) -> None:
    bootstrap.answer = web.Response(**answer)
    assert find(lookup, address) is None
    bootstrap.answer = None
    put(address, engine())
    clock.now_s += 1.1
    assert find(lookup, address) == ENDPOINT


@pytest.mark.parametrize("address", ["", "no address", "127.0.0.1:notaport", "127.0.0.1:99999999", "[::1"])
def test_an_address_that_is_none_is_no_endpoint(lookup: EndpointLookup, address: str) -> None:
    assert find(lookup, address) is None


@pytest.fixture
def dripping() -> Iterator[Callable[[bytes], str]]:
    """Start a server that sends so much of a reply, and then a byte every now and then; gives its address."""
    ended, threads = threading.Event(), []

    def drip(listener: socket.socket, begin: bytes) -> None:
        with listener, listener.accept()[0] as connection, contextlib.suppress(OSError):
            connection.sendall(begin)
            while not ended.wait(0.02):
                connection.sendall(b"x")

    def start(begin: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        threads.append(threading.Thread(target=drip, args=(listener, begin)))
        threads[-1].start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield start
    ended.set()
    for thread in threads:
        thread.join(10)


@pytest.mark.parametrize(
    "begin", [b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nServer: s", b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"]
)
def test_a_server_whose_answer_does_not_end_is_given_up(
    lookup: EndpointLookup, dripping: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    monkeypatch.setattr(directory, "_TIMEOUT_S", 0.3)
    began_s = time.monotonic()
    assert find(lookup, dripping(begin)) is None
    assert 0.2 < time.monotonic() - began_s < 5


def test_what_comes_in_small_pieces_is_not_received_for_longer() -> None:
    ours, theirs = socket.socketpair()
    with theirs, directory._PromptSocket(fileno=ours.detach()) as prompt:
        theirs.sendall(b"xx")
        prompt.until_s = time.monotonic() + 5
        assert prompt.recv_into(bytearray(1)) == 1
        prompt.until_s = time.monotonic()
        with pytest.raises(TimeoutError, match="too long"):
            prompt.recv_into(bytearray(1))


def test_a_fault_that_nobody_thought_of_is_logged_and_leaves_nobody_waiting(
    address: str,
    lookup: EndpointLookup,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    put(address, engine())
    with monkeypatch.context() as patched:
        patched.setattr(directory._OPENER, "open", lambda *_, **__: 1 / 0)
        assert find(lookup, address) is None
    assert "ZeroDivisionError" in caplog.text
    clock.now_s += 1.1
    assert find(lookup, address) == ENDPOINT


def test_a_server_that_sends_elsewhere_is_not_followed(
    serve: Serve, address: str, bootstrap: Bootstrap, lookup: EndpointLookup
) -> None:
    put(address, engine())
    elsewhere = Bootstrap()
    elsewhere.answer = web.Response(status=302, headers={"Location": f"http://{address}{ROUTE}"})
    assert find(lookup, serve(elsewhere.app)) is None
    assert bootstrap.asked == 0


def test_a_silent_engine_is_looked_up_again(address: str, bootstrap: Bootstrap, lookup: EndpointLookup) -> None:
    put(address, engine())
    assert find(lookup, address) == ENDPOINT
    put(address, engine("tcp://10.0.0.1:7009"))
    lookup.forget(ENDPOINT)
    assert find(lookup, address) == "tcp://10.0.0.1:7009"


def test_forgetting_one_engine_leaves_other_servers(serve: Serve, lookup: EndpointLookup) -> None:
    first, second = Bootstrap(), Bootstrap()
    addresses = serve(first.app), serve(second.app)
    put(addresses[0], engine())
    put(addresses[1], engine("tcp://10.0.0.2:7000"))
    for address in addresses:
        find(lookup, address)
    lookup.forget(ENDPOINT)
    assert at_once(lookup, addresses[1]) == ["tcp://10.0.0.2:7000"]
    assert second.asked == 1


def test_many_that_ask_at_once_ask_one_question(address: str, bootstrap: Bootstrap, lookup: EndpointLookup) -> None:
    put(address, engine())
    found: queue.Queue[str | None] = queue.Queue()
    for rank in (0, 0, 0, 1):
        lookup.find(address, dp_rank=0, tp_rank=rank, then=found.put)
    assert sorted(str(found.get(timeout=10)) for _ in range(4)) == ["None", ENDPOINT, ENDPOINT, ENDPOINT]
    assert bootstrap.asked == 1


def test_one_that_cannot_use_its_answer_does_not_keep_others_from_theirs(
    address: str, lookup: EndpointLookup, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(endpoint: str | None) -> None:
        raise ValueError("on purpose")

    put(address, engine())
    found: queue.Queue[str | None] = queue.Queue()
    lookup.find(address, dp_rank=0, tp_rank=0, then=fail)
    lookup.find(address, dp_rank=0, tp_rank=0, then=found.put)
    assert found.get(timeout=10) == ENDPOINT
    assert "could not be used" in caplog.text


def test_servers_that_are_remembered_are_bounded(
    serve: Serve, lookup: EndpointLookup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_MAX_SERVERS", 2)
    servers = [Bootstrap() for _ in range(3)]
    addresses = [serve(server.app) for server in servers]
    for address in addresses:
        put(address, engine())
        find(lookup, address)
    assert [find(lookup, address) for address in reversed(addresses)] == [ENDPOINT] * 3
    assert [server.asked for server in servers] == [2, 1, 1]


def test_forgetting_what_nobody_has_does_nothing(lookup: EndpointLookup) -> None:
    lookup.forget(ENDPOINT)


def test_a_closed_lookup_finds_nothing_and_raises_nothing(address: str, lookup: EndpointLookup) -> None:
    put(address, engine())
    lookup.close()
    assert at_once(lookup, address) == [None]
