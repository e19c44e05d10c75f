"""What transfer engines must know of each other travels once, and is there whenever a push needs it."""

from __future__ import annotations

import pytest

from sglang_dualpath.protocol import Hello, Message, Offer, Plane, Target
from sglang_dualpath.reader import sessions
from sglang_dualpath.reader.sessions import Sessions
from tests.reader.cluster import Cluster, wait_for

PAGES = 12
PLANES = (Plane(base=0, stride_bytes=8, page_bytes=8),)


def target(session: str, metadata: bytes = b"") -> Target:
    return Target(session=session, planes=PLANES, slots=4, metadata=metadata)


def two_requests(cluster: Cluster) -> None:
    """One after the other, on the only pair."""
    (prefill,), (decode,) = cluster.prefills, cluster.decodes
    for room in (1, 2):
        hashes = cluster.stored(f"prompt {room}", PAGES)
        decode.request(room, hashes, prefill.name)
        wait_for(lambda room=room: len(cluster.wire.sent(Hello)) == room)
        job = prefill.request(room, hashes)
        assert job.result() == PAGES
        job.check()
        decode.settle(room)


def test_metadata_comes_with_the_first_offer_alone(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    two_requests(cluster)
    offers = [message for message in cluster.wire.sent(Offer) if isinstance(message, Offer)]
    assert [offer.target.metadata for offer in offers] == [prefill.hop.metadata, b""]
    assert decode.hop.pushes >= 2
    cluster.check()


def test_metadata_comes_again_when_it_was_lost(cluster: Cluster) -> None:
    lost: list[Message] = []

    def lose(sender: str, receiver: str, message: Message) -> bool:
        if isinstance(message, Offer) and not lost:
            lost.append(message)
            return True
        return False

    cluster.wire.lose = lose
    _, decode = cluster.prefill(policy="decode"), cluster.decode()
    two_requests(cluster)
    assert lost
    assert decode.hop.pushes
    cluster.check()


def test_what_is_known_of_an_engine_completes_its_offers() -> None:
    known = Sessions()
    assert known.known("tcp://a") == ""
    first = target("one", b"keys")
    assert known.complete("tcp://a", first) is first
    assert known.known("tcp://a") == "one"
    assert known.complete("tcp://a", target("one")) == first


@pytest.mark.parametrize(("endpoint", "session"), [("tcp://a", "two"), ("tcp://b", "one")])
def test_metadata_of_one_session_is_not_taken_for_another(endpoint: str, session: str) -> None:
    known = Sessions()
    known.complete("tcp://a", target("one", b"keys"))
    assert known.complete(endpoint, target(session)).metadata == b""


def test_a_prefill_engine_that_restarted_is_another_session() -> None:
    known = Sessions()
    known.complete("tcp://a", target("one", b"old"))
    known.complete("tcp://a", target("two", b"new"))
    assert known.known("tcp://a") == "two"
    assert known.complete("tcp://a", target("two")).metadata == b"new"


def test_an_engine_without_metadata_is_never_named() -> None:
    known = Sessions()
    known.complete("tcp://a", target("host:1"))
    assert known.known("tcp://a") == ""


def test_no_more_than_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_MAX_ENGINES", 2)
    known = Sessions()
    for name in "abc":
        known.complete(name, target(name, b"keys"))
    assert [known.known(name) for name in "abc"] == ["", "b", "c"]
