"""The control thread lives through everything and never makes a caller wait."""

from __future__ import annotations

import itertools
import logging
import threading
import time

import pytest
import zmq

from sglang_dualpath.control import ControlServer, loop
from sglang_dualpath.control.loop import ControlErrorKind
from sglang_dualpath.errors import ControlError
from sglang_dualpath.protocol import Bye, Cancel
from tests.control.ends import Ends, port_of, wait_for


def fail(*_: object) -> None:
    raise RuntimeError("on purpose")


def test_a_handler_that_raises_is_counted_and_the_thread_lives(ends: Ends) -> None:
    server, prefill = ends.server(handler=fail)
    client, _ = ends.client()
    for _ in range(3):
        client.send(server.endpoint, Bye(room=1, attempt=0))
    wait_for(lambda: prefill.errors[ControlErrorKind.HANDLER] == 3)


def test_a_client_handler_that_raises_is_counted_and_the_thread_lives(ends: Ends) -> None:
    server, prefill = ends.server()
    client, decode = ends.client(handler=fail)
    client.send(server.endpoint, Bye(room=1, attempt=0))
    wait_for(lambda: prefill.messages)
    for _ in range(3):
        server.send(b"decode-1", Cancel(room=1, attempt=0))
    wait_for(lambda: decode.errors[ControlErrorKind.HANDLER] == 3)


def test_a_tick_that_raises_is_counted_and_comes_again(ends: Ends) -> None:
    _, prefill = ends.server(tick=fail, tick_s=0.01)
    wait_for(lambda: prefill.errors[ControlErrorKind.HANDLER] >= 2)
    assert set(prefill.errors) == {ControlErrorKind.HANDLER}


def test_a_gone_handler_that_raises_is_counted_and_not_called_again(ends: Ends) -> None:
    ticks: list[float] = []
    server, prefill = ends.server(tick=ticks.append, tick_s=0.01, handler_gone=fail, gone_grace_s=0.0)
    server.send(b"nobody", Cancel(room=1, attempt=0))
    wait_for(lambda: prefill.errors[ControlErrorKind.HANDLER])
    before = len(ticks)
    wait_for(lambda: len(ticks) > before + 2)
    assert prefill.errors == {ControlErrorKind.UNREACHABLE: 1, ControlErrorKind.HANDLER: 1}


def test_an_error_handler_that_raises_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with ControlServer("127.0.0.1", None, fail, fail, tick=fail, tick_s=0.01):
        wait_for(lambda: caplog.text.count("on_error raised") >= 2)


def test_a_fault_of_the_loop_itself_is_counted_and_survived(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    server, prefill = ends.server(tick_s=0.01)
    maintain = server._maintain
    monkeypatch.setattr(server, "_maintain", fail)
    wait_for(lambda: prefill.errors[ControlErrorKind.LOOP] >= 2)
    monkeypatch.setattr(server, "_maintain", maintain)
    client, _ = ends.client()
    client.send(server.endpoint, Bye(room=1, attempt=0))
    wait_for(lambda: prefill.messages)


def test_a_send_that_zmq_refuses_is_counted(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    server, prefill = ends.server()

    class Refusing:
        def send_multipart(self, *_: object) -> None:
            raise zmq.ZMQError(zmq.EINVAL)

    router = server._router
    monkeypatch.setattr(server, "_router", Refusing())
    server.send(b"peer", Cancel(room=1, attempt=0))
    wait_for(lambda: prefill.errors[ControlErrorKind.LOOP] == 1)
    monkeypatch.setattr(server, "_router", router)


def test_errors_of_one_kind_are_logged_once_in_a_while(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    client, decode = ends.client()
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            client.send("tcp://127.0.0.1:1", Bye(room=-1, attempt=0))
    assert decode.errors == {ControlErrorKind.ENCODE: 50}
    assert sum("encode" in record.getMessage() for record in caplog.records) == 1


def test_a_slow_handler_is_counted(ends: Ends) -> None:
    server, prefill = ends.server(handler=lambda *_: time.sleep(loop.SLOW_HANDLER_S + 0.05))
    client, _ = ends.client()
    client.send(server.endpoint, Bye(room=1, attempt=0))
    wait_for(lambda: prefill.errors[ControlErrorKind.SLOW_HANDLER])


def test_ticks_come_at_their_interval_with_the_time(ends: Ends) -> None:
    ticks: list[float] = []
    before_s = time.monotonic()
    ends.client(tick=ticks.append, tick_s=0.02)
    wait_for(lambda: len(ticks) >= 5)
    assert before_s <= ticks[0]
    assert all(later - earlier >= 0.02 for earlier, later in itertools.pairwise(ticks))


def test_ticks_go_on_under_a_flood(ends: Ends) -> None:
    ticks: list[float] = []
    stop = threading.Event()
    server, prefill = ends.server(tick=ticks.append, tick_s=0.02)
    client, _ = ends.client()

    def flood() -> None:
        while not stop.is_set():
            client.send(server.endpoint, Bye(room=1, attempt=0))

    flooder = threading.Thread(target=flood)
    flooder.start()
    try:
        wait_for(lambda: len(prefill.messages) > 2000 and len(ticks) > 10)
    finally:
        stop.set()
        flooder.join()


class Stuck:
    """A tick that does not return until it is released."""

    def __init__(self) -> None:
        self.entered, self.release = threading.Event(), threading.Event()

    def __call__(self, now_s: float) -> None:
        self.entered.set()
        self.release.wait(10)


def test_a_full_queue_drops_counts_and_never_waits(ends: Ends) -> None:
    stuck = Stuck()
    client, decode = ends.client(queue_limit=4, tick=stuck)
    assert stuck.entered.wait(10)
    try:
        start_s = time.monotonic()
        sent = [client.send("tcp://127.0.0.1:1", Bye(room=1, attempt=0)) for _ in range(10)]
        client.drop("tcp://127.0.0.1:1")  # never refused: it frees something
        assert time.monotonic() - start_s < 1.0
        assert sent == [True] * 4 + [False] * 6
        assert decode.errors == {ControlErrorKind.QUEUE_FULL: 6}
    finally:
        stuck.release.set()


def test_close_joins_quickly_with_messages_unsent(ends: Ends) -> None:
    client, _ = ends.client()
    for _ in range(100):
        client.send("tcp://192.0.2.1:9", Bye(room=1, attempt=0))  # a documentation address: nobody answers
    start_s = time.monotonic()
    client.close()
    assert time.monotonic() - start_s < loop.CLOSE_S
    assert not client._thread.is_alive()


def test_nothing_is_accepted_after_close(ends: Ends) -> None:
    server, prefill = ends.server()
    server.close()
    server.close()
    assert not server.send(b"peer", Cancel(room=1, attempt=0))
    assert not prefill.errors


def test_a_handler_may_close_its_own_end(ends: Ends) -> None:
    server, prefill = ends.server(handler=lambda *_: server.close())
    client, _ = ends.client()
    client.send(server.endpoint, Bye(room=1, attempt=0))
    wait_for(lambda: not server._thread.is_alive())
    assert not prefill.errors


def test_close_does_not_wait_for_a_stuck_handler(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CLOSE_S", 0.1)
    stuck = Stuck()
    server, prefill = ends.server(tick=stuck)
    assert stuck.entered.wait(10)
    server.close()
    assert prefill.errors == {ControlErrorKind.CLOSE: 1}
    stuck.release.set()
    wait_for(lambda: not server._thread.is_alive())


def test_an_address_that_cannot_be_bound_is_a_control_error_and_leaves_no_thread() -> None:
    threads = threading.active_count()
    with pytest.raises(ControlError, match=r"cannot be bound to 192\.0\.2\.1"):
        ControlServer("192.0.2.1", None, fail, fail)
    assert threading.active_count() == threads


def test_a_host_without_an_address_is_a_control_error() -> None:
    with pytest.raises(ControlError, match="has no address"):
        ControlServer("no-such-host.invalid", None, fail, fail)


def test_every_interface_can_be_bound(ends: Ends) -> None:
    server, prefill = ends.server("*")
    client, _ = ends.client()
    client.send(f"tcp://127.0.0.1:{port_of(server)}", Bye(room=1, attempt=0))
    wait_for(lambda: prefill.messages)


@pytest.mark.parametrize("engine", ["", "two words", "x" * 129, "\u00e9", "\0"])
def test_an_engine_id_that_zmq_or_the_protocol_cannot_carry_is_refused(ends: Ends, engine: str) -> None:
    with pytest.raises(ValueError, match="engine id"):
        ends.client(engine)


def test_a_wrong_key_is_refused_at_once(ends: Ends) -> None:
    with pytest.raises(ValueError, match="control key"):
        ends.server(key=b"short")
