"""Messages that are lost, doubled, late, out of order, or not what an honest peer would send."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_dualpath.protocol import (
    Bye,
    Cancel,
    Cancelled,
    Claim,
    Decline,
    Done,
    Fail,
    Grant,
    Hello,
    Message,
    NoOffer,
    Offer,
    Plane,
    Queued,
    Refuse,
    Settled,
    Target,
)
from sglang_dualpath.reader.decode_read import Asked, DecodeRead
from tests.reader.cluster import CONFIG, Cluster, DecodeEngine, prompt, running, wait_for

PAGES = 40
PREFILL = "prefill-1"


@pytest.mark.parametrize("kind", [Hello, Offer, Claim, Grant, Refuse, Done, Settled, NoOffer, Queued])
def test_every_message_may_come_twice(cluster: Cluster, kind: type[Message]) -> None:
    cluster.wire.double = lambda message: isinstance(message, kind)
    _, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", PAGES)
    job = cluster.request(hashes, held=8)
    assert job.result() == PAGES
    job.check()
    decode.settle(1)
    decode.jobs[1].check()
    cluster.check()


@pytest.mark.parametrize("kind", [Hello, Offer, Claim, Grant, Refuse, Done, Cancel, Cancelled, Settled, NoOffer, Fail])
def test_the_first_of_every_message_may_be_lost(cluster: Cluster, kind: type[Message]) -> None:
    lost: list[Message] = []

    def lose(sender: str, receiver: str, message: Message) -> bool:
        if isinstance(message, kind) and not lost:
            lost.append(message)
            return True
        return False

    cluster.wire.lose = lose
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", PAGES)
    decode.request(1, hashes, prefill.name, held=8)
    wait_for(lambda: cluster.wire.sent(Hello))
    freezes = kind in (Cancel, Cancelled, Fail)
    if freezes:
        # Its first push hangs until the prefill engine has taken the claim back.
        decode.hop.fault = lambda session: decode.freeze()
    job = prefill.request(1, hashes)
    if freezes:
        wait_for(lambda: prefill.reserve.quarantined)
        decode.hop.fault = lambda session: None
        decode.thaw()
    assert job.result() == PAGES
    assert job.ended_s - job.started_s < 3 * CONFIG.hello_silence_s
    job.check()
    decode.settle(1, within_s=3 * CONFIG.hello_silence_s)
    cluster.check()


def test_messages_out_of_order_harm_nobody(cluster: Cluster) -> None:
    cluster.wire.jitter_s = 0.05
    prefill, decode = cluster.prefill(policy="split", slots=512), cluster.decode(slots=512)
    jobs = []
    for room in range(6):
        hashes = prompt(f"p{room}", PAGES)
        cluster.storage.put(hashes)
        decode.request(room, hashes, prefill.name, held=room)
        jobs.append(prefill.request(room, hashes, stored=PAGES))
        if len(jobs) == 3:
            wait_for(lambda: jobs[0].done.is_set())
    for room, job in enumerate(jobs):
        assert job.result() == PAGES
        job.check()
        decode.settle(room)
    cluster.check()


def test_a_grant_that_comes_twice_is_carried_once(cluster: Cluster) -> None:
    # The second must not be answered while the first is at work: its last word would free slots that are written to.
    cluster.wire.double = lambda message: isinstance(message, Grant)
    _, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", 9)
    decode.hop.gate.clear()
    job = cluster.request(hashes)
    wait_for(lambda: decode.hop.in_flight)
    assert not cluster.wire.sent(Fail)
    assert not cluster.wire.sent(Cancelled)
    decode.hop.gate.set()
    assert job.result() == 9
    job.check()
    decode.settle(1)
    assert max(cluster.storage.reads.values()) == 1
    cluster.check()


def test_a_grant_that_its_cancel_overtook_is_not_carried(cluster: Cluster) -> None:
    grants: list[Grant] = []

    def keep_the_first(sender: str, receiver: str, message: Message) -> bool:
        if isinstance(message, Grant) and not grants:
            grants.append(message)
            return True
        return False

    cluster.wire.lose = keep_the_first
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", 30)
    cluster.storage.latency_s = 0.02
    job = cluster.request(hashes)
    wait_for(lambda: grants)
    (grant,) = grants
    decode.reads.handle(prefill.name, Cancel(grant.room, grant.attempt, grant.claim_id))
    decode.reads.handle(prefill.name, grant)
    assert (prefill.name, grant.claim_id) not in decode.reads.in_hand
    assert [word.claim_id for word in cluster.wire.sent(Cancelled)] == [grant.claim_id] * 2
    assert job.result() == 30
    job.check()
    decode.settle(1)
    cluster.check()


def test_a_cancel_is_not_answered_while_its_claim_is_at_work(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", 9)
    decode.hop.gate.clear()
    job = cluster.request(hashes)
    wait_for(lambda: decode.hop.in_flight)
    stuck = {chunk.grant.claim_id for chunk in decode.reads.reads[1].busy}
    assert job.result() == 9
    # Asked again and again, also after the room is forgotten by its scheduler.
    wait_for(lambda: sum(message.claim_id in stuck for message in cluster.wire.sent(Cancel)) > 2 * len(stuck))
    said = {message.claim_id for message in cluster.wire.sent(Cancelled)} & stuck
    assert prefill.reserve.quarantined >= 1
    assert not said & {chunk.grant.claim_id for chunk in decode.reads.reads[1].busy}
    decode.hop.gate.set()
    decode.settle(1)
    cluster.check()


def test_cancels_are_asked_again_for_every_claim_and_without_a_flood(cluster: Cluster) -> None:
    cluster.config = msgspec.structs.replace(CONFIG, lease_s=2.0)  # no claim is taken back before all are granted
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", PAGES)
    decode.hop.gate.clear()  # every claim that may be open stays so
    job = cluster.request(hashes)
    wait_for(lambda: len(cluster.wire.sent(Grant)) >= 2 * CONFIG.claims_in_flight)
    decode.freeze()
    job.result()
    prefill.reads.abandon_all()  # forgets the room
    late = {key[2] for key in prefill.reads.late}
    since_s, sent = time.monotonic(), len(cluster.wire.sent(Cancel))
    wait_for(lambda: len(cluster.wire.sent(Cancel)) >= sent + 3 * len(late))
    asked = Counter(message.claim_id for message in cluster.wire.sent(Cancel)[sent:])
    rounds = (time.monotonic() - since_s) / prefill.reads.cancel_every_s
    assert len(late) >= 2
    assert asked.keys() == late
    assert max(asked.values()) - min(asked.values()) <= 1
    assert max(asked.values()) <= rounds + 1
    decode.thaw()
    decode.settle(1)
    cluster.check()


def test_an_offer_to_a_request_that_went_on_is_declined(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = prompt("a", 12)
    cluster.storage.put(hashes[:6])
    decode.request(1, hashes, prefill.name, held=12)
    wait_for(lambda: cluster.wire.sent(Hello))
    # It gives up without a word that arrives.
    cluster.wire.lose = lambda sender, receiver, message: isinstance(message, Bye)
    decode.reads.gone(1)
    job = prefill.request(1, hashes, stored=6)
    assert job.result() == 6
    assert job.ended_s - job.started_s < 2.0
    job.check()
    assert cluster.wire.sent(Decline) or cluster.wire.sent(Bye)
    cluster.check()


def test_a_lost_claim_is_asked_again_while_prefill_lives(cluster: Cluster) -> None:
    lost: list[Message] = []

    def lose(sender: str, receiver: str, message: Message) -> bool:
        if isinstance(message, Claim) and len(lost) < CONFIG.claims_in_flight:
            lost.append(message)
            return True
        return False

    cluster.wire.lose = lose
    _, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", 12)
    job = cluster.request(hashes)
    assert job.result() == 12
    job.check()
    decode.settle(1)
    cluster.check()


def test_two_decode_engines_that_greet_for_one_room_are_both_answered(cluster: Cluster) -> None:
    prefill = cluster.prefill(policy="decode")
    decodes = [cluster.decode("decode-1"), cluster.decode("decode-2")]
    hashes = cluster.stored("a", 12)
    for decode in decodes:
        decode.request(1, hashes, prefill.name)
    wait_for(lambda: len(cluster.wire.sent(Hello)) == 2)
    job = prefill.request(1, hashes)
    assert job.result() == 12
    job.check()
    for decode in decodes:
        decode.settle(1)
    cluster.check()


def test_nothing_but_a_prefill_engine_of_ours_is_obeyed(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", 12)
    decode.request(1, hashes, prefill.name)
    wait_for(lambda: cluster.wire.sent(Hello))
    cluster.wire.join("stranger", lambda sender, message: None, lambda: None)
    for message in (Cancel(1, 0, None), NoOffer(1, "closed"), Refuse(1, 0, 1, "met", False)):
        cluster.wire.send("stranger", decode.name, message)
    job = prefill.request(1, hashes)
    assert job.result() == 12
    decode.settle(1)
    assert decode.jobs[1].kept == 12
    cluster.check()


def test_pages_that_were_granted_are_not_read_again(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", 9)
    first: list[Grant] = []

    def note(sender: str, receiver: str, message: Message) -> bool:
        if isinstance(message, Grant) and not first:
            first.append(message)
        return False

    cluster.wire.lose = note
    decode.hop.gate.clear()
    job = cluster.request(hashes)
    wait_for(lambda: first and decode.hop.in_flight)
    read = decode.reads.reads[1]
    with decode.reads.lock:
        read.ended = None
        read.requested[77] = Asked(decode.reads.clock(), False)
        decode.reads.handle(prefill.name, msgspec.structs.replace(first[0], request_id=77, claim_id=10**9))
    assert cluster.fallbacks("bad_grant") == 1
    decode.hop.gate.set()
    assert job.result() == 9
    job.check()
    decode.settle(1)
    cluster.check()


# What no honest prefill engine would grant

target_slots = 64
offered = range(4, 20)
held_pages = 8


def honest(slots: tuple[int, ...], first_page: int, memory: bool, attempt: int) -> bool:
    end = first_page + len(slots)
    in_offer = offered.start <= first_page and end <= offered.stop and attempt == 3
    in_pool = all(slot < target_slots for slot in slots)
    return in_offer and in_pool and (end <= held_pages if memory else first_page >= held_pages and end <= 16)


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[Cluster, DecodeEngine]]:
    with running(Cluster()) as cluster:
        cluster.sessions["victim"] = cluster.prefill("victim", slots=target_slots, reserve=target_slots).pool
        cluster.wire.join(PREFILL, lambda sender, message: None, lambda: None)
        yield cluster, cluster.decode(slots=512)


rooms = iter(range(10**9))


@settings(max_examples=120)
@given(
    first_page=st.integers(0, 24),
    slots=st.lists(st.integers(0, target_slots + 4), min_size=1, max_size=12, unique=True).map(tuple),
    memory=st.booleans(),
    attempt=st.sampled_from([3, 3, 3, 2, 4]),
    request=st.sampled_from(["ours", "ours", "other"]),
    opened=st.booleans(),
)
def test_a_grant_outside_what_was_offered_never_pushes_a_byte(
    engine: tuple[Cluster, DecodeEngine],
    first_page: int,
    slots: tuple[int, ...],
    memory: bool,
    attempt: int,
    request: str,
    opened: bool,
) -> None:
    cluster, decode = engine
    room = next(rooms)
    hashes = prompt("a", 20)
    cluster.storage.put(hashes[:16])
    decode.hop.written.clear()
    pushes = decode.hop.pushes
    asked: list[int] = []

    def note(sender: str, receiver: str, message: Message) -> bool:
        if isinstance(message, Claim) and message.room == room:
            asked.append(message.request_id)
        return False

    cluster.wire.lose = note
    read = decode.request(room, hashes, PREFILL, held=held_pages)
    victim = cluster.sessions["victim"]
    offer = Offer(
        room=room,
        attempt=3,
        first_page=offered.start,
        end_page=offered.stop,
        storage_end_page=16,
        end_hash=hashes[-1],
        target=Target("victim", tuple(Plane(*plane) for plane in victim.pages.planes), target_slots),
        lease_s=0.3,
        chunk_pages=3,
        limit_pages=None,
        engine=PREFILL,
    )
    cluster.wire.send(PREFILL, decode.name, offer)
    wait_for(lambda: asked)
    if opened:
        wait_for(lambda: read.prefetch is not None)
    claim_id = 10**6 + room
    words_before = len(cluster.wire.log)
    number = asked[0] if request == "ours" else 10**9
    cluster.wire.send(PREFILL, decode.name, Grant(room, attempt, number, claim_id, first_page, slots, memory, 0.3))

    def word() -> list[Message]:
        said = [message for _, _, message in cluster.wire.log[words_before:]]
        return [m for m in said if isinstance(m, Done | Fail | Cancelled) and m.claim_id == claim_id]

    wait_for(word, "a last word")
    if honest(slots, first_page, memory, attempt) and request == "ours":
        # One that comes before the read was opened may be served or not; what it may write is settled.
        assert {slot for _, slot in decode.hop.written} <= set(slots)
    else:
        assert not isinstance(word()[0], Done)
        assert decode.hop.pushes == pushes
        assert not decode.hop.written
    decode.abort(room)
    wait_for(lambda: _gone(decode, read))
    decode.pool.free(read.held_slots)
    if room in decode.jobs and decode.jobs[room].kept:
        decode.pool.free(decode.jobs[room].slots()[: decode.jobs[room].kept])


def _gone(decode: DecodeEngine, read: DecodeRead) -> bool:
    job = decode.jobs.get(read.room)
    return read.room not in decode.reads.reads and (job is None or job.done.is_set())
