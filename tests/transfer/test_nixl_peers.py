"""Whom NIXL's transport knows, over an agent that does what a test wants."""

from __future__ import annotations

import pytest

from sglang_dualpath.transfer import nixl as nixl_module
from tests.transfer.nixl_agent import PEER, Agent, peer_called, transport_over


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
