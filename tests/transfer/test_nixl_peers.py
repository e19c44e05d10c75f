"""Whom NIXL's transport knows, over an agent that does what a test wants."""

from __future__ import annotations

import threading

import pytest

from sglang_dualpath.errors import NotPushedError, TransferError
from sglang_dualpath.transfer import Peer
from sglang_dualpath.transfer import nixl as nixl_module
from tests.reader.host import wait_for
from tests.transfer.nixl_agent import PEER, Agent, Handle, peer_called, transport_over


@pytest.fixture
def agent() -> Agent:
    return Agent()


def test_names_of_peers_may_be_text(agent: Agent) -> None:
    agent.loaded_as = "there"
    transport_over(agent).push(PEER, [0], [0])
    assert agent.moved


def test_peers_are_forgotten_when_there_are_too_many(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_module, "_MAX_PEERS", 1)
    transport = transport_over(agent)
    transport.push(PEER, [0], [0])
    transport.push(peer_called("third"), [0], [0])
    assert "unload there" in agent.log


def test_the_peer_that_was_not_pushed_to_for_longest_is_forgotten_first(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_module, "_MAX_PEERS", 2)
    transport = transport_over(agent)
    for name in ("there", "second", "there", "third"):
        transport.push(peer_called(name), [0], [0])
    assert [line for line in agent.log if line.startswith("unload")] == ["unload second"]


def test_forgetting_a_peer_holds_up_pushes_to_that_one_alone(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_module, "_MAX_PEERS", 1)
    transport = transport_over(agent)
    transport.push(PEER, [0], [0])
    unloading, go_on, forget = threading.Event(), threading.Event(), agent.remove_remote_agent

    def hang(name: str) -> None:
        if name == "there":
            unloading.set()
            assert go_on.wait(10)
        forget(name)

    def pushing(peer: Peer) -> threading.Thread:
        thread = threading.Thread(target=transport.push, args=(peer, [0], [0]), daemon=True)
        thread.start()
        return thread

    monkeypatch.setattr(agent, "remove_remote_agent", hang)
    third = pushing(peer_called("third"))
    assert unloading.wait(10)
    other = pushing(peer_called("other"))
    other.join(5)
    again = pushing(PEER)
    again.join(0.1)
    held_up = other.is_alive(), again.is_alive()
    go_on.set()
    for thread in (third, other, again):
        thread.join(10)
    assert held_up == (False, True), "who pushes to it again must not have it unloaded under that push"
    assert agent.log.index("unload there") < agent.log.index("load about there", 5)


def test_a_peer_is_not_forgotten_while_a_write_to_it_is_under_way(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_module, "_MAX_PEERS", 1)
    transport = transport_over(agent, deadline_s=0.02)
    agent.states = ["PROC"]
    with pytest.raises(TransferError) as caught:
        transport.push(PEER, [0], [0])
    agent.transfer = lambda _: "DONE"  # type: ignore[method-assign]
    transport.push(peer_called("third"), [0], [0])
    assert "unload there" not in agent.log
    agent.states = ["DONE"]
    wait_for(caught.value.over)
    transport.push(peer_called("third"), [0], [0])
    assert "unload there" in agent.log


@pytest.mark.parametrize("name", ["their", "theresa", "somebody else"])
def test_metadata_of_another_engine_is_not_loaded(agent: Agent, name: str) -> None:
    """Loading it would change, or where it is broken drop, what that engine's own writes rely on."""
    peer = PEER._replace(metadata=b"about there|by UCX")
    transport = transport_over(agent)
    transport.push(peer, [0], [0])
    agent.log.clear()
    with pytest.raises(NotPushedError, match="metadata is that of another agent"):
        transport.push(peer._replace(session=name), [0], [0])
    assert agent.log == []
    transport.push(peer, [1], [1])
    assert agent.log == ["release write 2"]


def test_metadata_that_turns_out_to_be_of_another_engine_is_left_to_that_one(agent: Agent) -> None:
    transport = transport_over(agent)
    transport.push(PEER, [0], [0])
    agent.log.clear()
    with pytest.raises(NotPushedError, match="metadata is that of there"):
        transport.push(PEER._replace(session="the"), [0], [0])  # which the other one's name begins with
    assert agent.log == ["load about there"]
    transport.push(PEER, [1], [1])
    assert agent.log[1:] == ["release write 2"]


def test_a_peer_that_says_nothing_of_itself_is_not_met(agent: Agent) -> None:
    with pytest.raises(NotPushedError, match="did not say"):
        transport_over(agent).push(PEER._replace(metadata=b""), [0], [0])
    assert not agent.moved


def test_what_nixl_has_dropped_by_itself_is_forgotten_all_the_same(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("NIXL_ERR_NOT_FOUND")

    transport = transport_over(agent)
    transport.push(PEER, [0], [0])
    monkeypatch.setattr(agent, "remove_remote_agent", refuse)
    monkeypatch.setattr(Handle, "release", refuse)
    transport.close()
    assert agent.log[-1] == "deregister regions"
