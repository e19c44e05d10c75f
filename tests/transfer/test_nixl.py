"""NIXL's transport over an agent that does what a test wants: what it asks of it, and what it gives back."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from sglang_dualpath import metrics
from sglang_dualpath.errors import NotPushedError, TransferError
from sglang_dualpath.protocol import MAX_METADATA_BYTES
from sglang_dualpath.transfer import PlaneGeometry, PoolGeometry
from sglang_dualpath.transfer import nixl as nixl_module
from sglang_dualpath.transfer.nixl import NixlTransport
from tests.reader.host import wait_for
from tests.transfer.nixl_agent import (
    PEER,
    Agent,
    Handle,
    nixlBackendError,
    nixlRemoteDisconnectError,
    nixlUnknownError,
    transport_over,
)

LOST = nixlUnknownError("was invalidated or re-registered during transfer")


@pytest.fixture
def agent() -> Agent:
    return Agent()


def test_pages_are_prepared_once_on_both_sides_and_pushed_by_number(agent: Agent) -> None:
    transport = transport_over(agent)
    assert agent.prepared[""] == [[1000, 10, 0, 10, 6], [5000, 8, 0, 20, 6]]
    transport.push(PEER, [0, 5], [3, 1])
    transport.push(PEER, [2], [2])
    assert agent.prepared["there"] == [[7000, 10, 0, 10, 4], [9000, 8, 0, 8, 4]]
    assert agent.moved == [([0, 5, 6, 11], [3, 1, 7, 5]), ([2, 8], [2, 6])]
    assert [line for line in agent.log if "load" in line] == ["load about there"]


def test_what_peers_must_know_is_that_of_the_host_pool_alone(agent: Agent) -> None:
    transport = transport_over(agent)
    assert (transport.session, transport.metadata) == ("here", b"about here")
    assert agent.log == ["register [(1000, 60), (5000, 108)] DRAM"]


def test_more_than_an_offer_can_carry_is_refused_at_start(agent: Agent) -> None:
    agent.about = bytes(MAX_METADATA_BYTES + 1)
    with pytest.raises(TransferError, match="UCX_NET_DEVICES"):
        transport_over(agent)


def test_memory_that_cannot_be_registered_is_refused_at_start(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> object:
        raise ValueError("NIXL_ERR_BACKEND")

    monkeypatch.setattr(agent, "register_memory", refuse)
    with pytest.raises(TransferError, match=r"168 bytes .*NIXL_ERR_BACKEND.*memlock"):
        transport_over(agent)


@pytest.mark.parametrize(
    ("states", "says"),
    [
        (["ERR"], "an error"),
        (["PROC", "PROC", "ERR"], "an error"),
        ([nixlBackendError("NIXL_ERR_BACKEND")], "NIXL_ERR_BACKEND"),
        (["PROC", nixlRemoteDisconnectError("NIXL_ERR_REMOTE_DISCONNECT"), "DONE"], "NIXL_ERR_REMOTE_DISCONNECT"),
    ],
)
def test_a_failed_write_is_released_and_its_peer_is_met_again(
    agent: Agent, states: list[str | Exception], says: str
) -> None:
    transport = transport_over(agent)
    agent.states = states
    with pytest.raises(TransferError, match=says) as caught:
        transport.push(PEER, [0], [0])
    assert caught.value.over()
    assert transport.drain_s >= 60
    assert agent.log[-3:] == ["release write 1", "release pages of there", "unload there"]
    agent.states = ["PROC", "DONE"]
    transport.push(PEER, [0], [0])
    assert agent.log[-2:] == ["load about there", "release write 2"]


def test_a_peer_whose_metadata_others_have_dropped_is_met_again_within_the_push(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = transport_over(agent)
    transport.push(PEER, [0], [0])
    make, failures = agent.make_prepped_xfer, [RuntimeError("NIXL_ERR_NOT_FOUND")]

    def fail_first(*arguments: Any) -> Handle:
        if failures:
            raise failures.pop()
        return make(*arguments)

    monkeypatch.setattr(agent, "make_prepped_xfer", fail_first)
    transport.push(PEER, [1], [1])
    assert agent.log[-4:] == ["release pages of there", "unload there", "load about there", "release write 2"]


def test_no_pages_are_no_write(agent: Agent) -> None:
    transport_over(agent).push(PEER, [], [])
    assert not agent.asked


def test_every_write_is_released(agent: Agent) -> None:
    transport = transport_over(agent)
    for _ in range(3):
        transport.push(PEER, [0], [0])
    assert [line for line in agent.log if line.startswith("release")] == [f"release write {n}" for n in (1, 2, 3)]


def test_an_overdue_write_is_kept_until_it_has_ended(agent: Agent) -> None:
    transport = transport_over(agent, deadline_s=0.05)
    agent.states = ["PROC"]
    with pytest.raises(TransferError, match=r"not ended a push to there in 0\.05 s") as caught:
        transport.push(PEER, [0], [0])
    with pytest.raises(TransferError, match="earlier push"):
        transport.push(PEER, [0], [0])
    assert not caught.value.over()
    assert "release write 1" not in agent.log
    agent.states = ["DONE"]
    wait_for(caught.value.over)
    assert agent.log[-1] == "release write 1"
    transport.push(PEER, [0], [0])


def test_memory_stays_registered_while_a_write_may_read_it(agent: Agent) -> None:
    transport = transport_over(agent, deadline_s=0.02)
    agent.states = ["PROC"]
    with pytest.raises(TransferError):
        transport.push(PEER, [0], [0])
    transport.close()
    assert not [line for line in agent.log if line.startswith(("release", "unload", "deregister"))]


def test_the_thread_that_watches_ends_with_its_transport(agent: Agent) -> None:
    transport = transport_over(agent)
    (watcher,) = (one for one in threading.enumerate() if one is transport._watcher)
    transport.close()
    assert not watcher.is_alive()


@pytest.mark.parametrize(
    ("said", "drain_s"), [("", 60.0), ("20s", 60.0), ("1m", 180.0), ("100ms", 60.0), ("30", 90.0), ("40.5s", 121.5)]
)
def test_bytes_of_a_failed_write_are_waited_for_as_long_as_ucx_looks_for_dead_peers(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, said: str, drain_s: float
) -> None:
    monkeypatch.setenv("UCX_KEEPALIVE_INTERVAL", said)
    assert NixlTransport(agent).drain_s == pytest.approx(drain_s)


@pytest.mark.parametrize("said", ["inf", "soon", "-1s"])
def test_a_ucx_that_never_looks_for_dead_peers_is_refused(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setenv("UCX_KEEPALIVE_INTERVAL", said)
    with pytest.raises(TransferError, match=f"UCX_KEEPALIVE_INTERVAL={said} .* unset it"):
        NixlTransport(agent)


def test_an_overdue_write_that_fails_is_over_when_nothing_of_it_can_be_under_way(agent: Agent) -> None:
    transport = transport_over(agent, deadline_s=0.02)
    transport.drain_s = 0.3
    agent.states = ["PROC"]
    with pytest.raises(TransferError) as caught:
        transport.push(PEER, [0], [0])
    agent.states = [nixlRemoteDisconnectError("NIXL_ERR_REMOTE_DISCONNECT")]
    wait_for(lambda: "release write 1" in agent.log)
    assert not caught.value.over()
    wait_for(caught.value.over)
    agent.states = ["DONE"]
    transport.push(PEER, [0], [0])
    assert agent.log[-3:] == ["unload there", "load about there", "release write 2"], "its connection was dead"


def test_a_write_whose_state_cannot_be_had_may_still_be_under_way(agent: Agent) -> None:
    transport = transport_over(agent, deadline_s=0.02)
    agent.states = ["PROC", LOST]
    with pytest.raises(TransferError, match="not ended") as caught:
        transport.push(PEER, [0], [0])
    time.sleep(0.2)
    assert not caught.value.over()
    assert "release write 1" not in agent.log
    agent.states = ["DONE"]
    wait_for(caught.value.over)


def test_a_write_of_which_nixl_has_lost_track_is_said_and_counted_once_and_never_taken_for_ended(
    agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    transport = transport_over(agent, deadline_s=0.02)
    transport.drain_s = 0.1
    counted = metrics.FALLBACKS.value(reason="push_state_unknown")
    agent.states = ["PROC", LOST]
    with pytest.raises(TransferError) as caught:
        transport.push(PEER, [0], [0])
    wait_for(lambda: "cannot say whether a push to there goes on" in caplog.text)
    time.sleep(0.5)
    assert caplog.text.count("goes on") == 1
    assert metrics.FALLBACKS.value(reason="push_state_unknown") == counted + 1
    assert not caught.value.over()
    assert "release write 1" not in agent.log
    agent.states = ["DONE"]
    wait_for(caught.value.over)


class Clock:
    """Time that passes while somebody sleeps, and with every question."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, pause_s: float) -> None:
        self.pauses.append(pause_s)
        self.now_s += pause_s + 1e-5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(nixl_module, "time", made)
    return made


def test_a_write_of_which_nixl_knows_every_now_and_then_is_not_said_to_be_lost(
    agent: Agent, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    straggler = nixl_module._Straggler(Handle("write", agent.log), "there", 60.0)
    agent.states = [*[LOST] * 9, "PROC"] * 10
    while len(agent.states) > 1:
        straggler.look(agent.check_xfer_state)
        clock.now_s += 6.0
    assert not caplog.messages


def push_for(agent: Agent, clock: Clock, transport: NixlTransport, seconds: float, pages: int = 4) -> float:
    """Push pages that take so long; how much later it is seen."""
    done_s = clock.now_s + seconds
    clock.pauses.clear()
    agent.check_xfer_state = lambda handle: "DONE" if clock.now_s >= done_s else "PROC"  # type: ignore[method-assign]
    transport.push(PEER, range(pages), range(pages))
    return clock.now_s - done_s


def test_a_write_is_asked_about_without_pauses_only_around_its_expected_end(agent: Agent, clock: Clock) -> None:
    transport = transport_over(agent)
    push_for(agent, clock, transport, 0.05)
    late_s = push_for(agent, clock, transport, 0.05)
    assert sum(clock.pauses) == pytest.approx(0.045, rel=0.1)  # of 0.05 s
    assert late_s < 0.001
    # Twice as many pages are expected to take twice as long.
    assert push_for(agent, clock, transport, 0.025, pages=2) < 0.001
    assert sum(clock.pauses) == pytest.approx(0.02, rel=0.1)


def test_a_write_that_takes_longer_than_expected_is_asked_about_ever_more_seldom(agent: Agent, clock: Clock) -> None:
    transport = transport_over(agent)
    assert push_for(agent, clock, transport, 10.0) <= 0.021
    eager = [pause_s for pause_s in clock.pauses if not pause_s]
    assert len(eager) * 1e-5 <= 0.0051
    assert max(clock.pauses) == 0.02
    assert len(clock.pauses) - len(eager) < 600


def test_for_how_long_a_late_write_is_asked_about_without_pauses(agent: Agent, clock: Clock) -> None:
    transport = transport_over(agent)
    for seconds in (0.06, 0.06):
        push_for(agent, clock, transport, seconds)
    assert push_for(agent, clock, transport, 0.072) < 0.0001  # 20 % late, found without a pause
    for seconds in (0.4, 0.4):
        push_for(agent, clock, transport, seconds)
    push_for(agent, clock, transport, 4.0)
    eager = [pause_s for pause_s in clock.pauses if not pause_s]
    assert 0.024 < len(eager) * 1e-5 < 0.026


def test_a_write_that_ends_as_it_is_posted_counts_as_one_of_that_time(agent: Agent, clock: Clock) -> None:
    transport = transport_over(agent)

    def post(handle: Handle) -> str:
        clock.now_s += 0.05
        return "DONE"

    agent.transfer = post  # type: ignore[method-assign]
    transport.push(PEER, range(4), range(4))
    del agent.transfer
    assert push_for(agent, clock, transport, 0.05) < 0.001
    assert sum(clock.pauses) == pytest.approx(0.045, rel=0.1)


def test_what_was_held_up_once_is_not_expected_again(agent: Agent, clock: Clock) -> None:
    transport = transport_over(agent)
    for seconds in (0.01, 5.0):
        push_for(agent, clock, transport, seconds)
    assert push_for(agent, clock, transport, 0.01) < 0.001
    for _ in range(50):
        push_for(agent, clock, transport, 0.1)
    assert sum(clock.pauses) > 0.09  # a rate that is slower for good is


def test_a_frozen_peer_takes_no_core(agent: Agent, clock: Clock) -> None:
    transport = transport_over(agent)
    agent.states = ["PROC"]
    with pytest.raises(TransferError, match="30 s"):
        transport.push(PEER, [0], [0])
    asked = agent.asked
    agent.states = ["DONE"]  # for whoever watches it from now on
    assert asked < 2500  # in 30 s


def test_pools_that_differ_are_refused_before_anything_is_written(agent: Agent) -> None:
    transport = transport_over(agent)
    other = PEER._replace(pool=PoolGeometry((PlaneGeometry(7000, 10, 9),), 4))
    with pytest.raises(NotPushedError, match="differ"):
        transport.push(other, [0], [0])
    with pytest.raises(NotPushedError, match="1 source pages for 2"):
        transport.push(PEER, [0], [0, 1])
    assert not agent.moved


def test_closing_gives_everything_back_once(agent: Agent) -> None:
    transport = transport_over(agent)
    transport.push(PEER, [0], [0])
    agent.log.clear()
    transport.close()
    transport.close()
    assert agent.log == ["release pages of there", "unload there", "release pages of here", "deregister regions"]
