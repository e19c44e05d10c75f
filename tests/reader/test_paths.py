"""Both read paths without faults: who reads what, and that every byte is in its place."""

from __future__ import annotations

import msgspec
import pytest

from sglang_dualpath.protocol import Claim, Decline, Done, Grant, Hello, NoOffer, NoOfferReason, Offer, Queued
from sglang_dualpath.reader import prefill as prefill_reads
from tests.reader.cluster import PAGE_BYTES, PATIENT, Cluster, prompt, wait_for
from tests.reader.host import WAIT_S
from tests.reader.watching import Watching

# No test here is about a lease that runs out, or about silence.
pytestmark = pytest.mark.usefixtures("patient")

PAGES = 40


def own_pages(cluster: Cluster) -> float:
    return cluster.counted('sglang_dualpath_read_bytes_total{engine_role="prefill",path="prefill"}') / PAGE_BYTES


def decode_pages(cluster: Cluster) -> float:
    return cluster.counted('sglang_dualpath_read_bytes_total{engine_role="decode",path="decode"}') / PAGE_BYTES


@pytest.mark.parametrize("policy", ["prefill", "decode", "shorter_queue", "split"])
def test_every_policy_brings_every_page_once(cluster: Cluster, policy: str) -> None:
    _, decode = cluster.prefill(policy=policy), cluster.decode()
    hashes = cluster.stored("a", PAGES)
    # Where both read, a side that is held up for a second or two still finds something to read.
    cluster.storage.latency_s = 0.15 if policy == "split" else 0.005
    job = cluster.request(hashes)
    assert job.result() == PAGES
    job.check()
    decode.settle(1)
    assert set(cluster.storage.reads.values()) == {1}
    if 1 in decode.jobs:
        decode.jobs[1].check()
    if policy == "decode":
        assert own_pages(cluster) == 0
    if policy in ("prefill", "shorter_queue"):
        assert decode_pages(cluster) == 0
    if policy == "split":
        assert own_pages(cluster) >= 5
        assert decode_pages(cluster) >= 5
    cluster.check()


def test_the_decode_engine_keeps_the_prefix_that_it_read(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(), cluster.decode()
    hashes = cluster.stored("a", PAGES)
    cluster.storage.gate.clear()
    decode.request(1, hashes, prefill.name)
    job = prefill.request(1, hashes)
    wait_for(lambda: cluster.storage.in_flight == 2, "both read")
    cluster.storage.gate.set()
    assert job.result() == PAGES
    decode.settle(1)
    kept = decode.jobs[1]
    kept.check()
    assert kept.kept == decode_pages(cluster) > 0
    cluster.check()


@pytest.mark.parametrize("hello_first", [True, False])
def test_the_order_of_arrival_does_not_matter(cluster: Cluster, hello_first: bool) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", 12)
    if hello_first:
        decode.request(1, hashes, prefill.name)
        wait_for(lambda: cluster.wire.sent(Hello))
        job = prefill.request(1, hashes)
    else:
        job = prefill.request(1, hashes)
        decode.request(1, hashes, prefill.name)
    assert job.result() == 12
    job.check()
    decode.settle(1)
    assert decode_pages(cluster) == 12
    cluster.check()


def test_what_decode_holds_in_memory_is_not_read_from_storage(cluster: Cluster) -> None:
    _, decode = cluster.prefill(), cluster.decode()
    hashes = cluster.stored("a", 20)
    job = cluster.request(hashes, held=20)
    assert job.result() == 20
    job.check()
    decode.settle(1)
    assert not cluster.storage.reads
    cluster.check()


def test_pages_that_are_in_memory_alone_come_over_the_hop(cluster: Cluster) -> None:
    _, decode = cluster.prefill(), cluster.decode()
    hashes = prompt("a", 24)
    cluster.storage.put(hashes[:15])
    job = cluster.request(hashes, held=24, stored=15)
    assert job.result() == 24
    job.check()
    decode.settle(1)
    cluster.check()


def test_a_memory_only_read_ends_by_itself_and_releases_what_it_held(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(), cluster.decode()
    hashes = prompt("a", 9)
    # The prefill engine's answer to a closed read is lost, so only the decode engine can know that it is through.
    cluster.wire.lose = lambda sender, receiver, message: isinstance(message, NoOffer)
    read = decode.request(1, hashes, prefill.name, held=9)
    wait_for(lambda: cluster.wire.sent(Hello))
    job = prefill.request(1, hashes, stored=0)
    assert job.result() == 9
    wait_for(lambda: read.over, within_s=2.0)
    assert read.ended == "through"
    job.check()
    cluster.check()


def test_the_suffix_is_read_while_the_prefix_in_memory_is_pushed(cluster: Cluster) -> None:
    _, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", 30)
    job = cluster.request(hashes, held=13, first_page=4)
    assert job.result() == 26
    job.check()
    decode.settle(1)
    assert decode.jobs[1].kept == 17
    decode.jobs[1].check()
    assert decode_pages(cluster) == 17
    assert own_pages(cluster) == 0
    cluster.check()


def test_a_decode_engine_that_has_less_declines(cluster: Cluster) -> None:
    _, decode = cluster.prefill(), cluster.decode()
    hashes = cluster.stored("a", 20)
    job = cluster.request(hashes, held=3, first_page=6)
    assert job.result() == 14
    job.check()
    decode.settle(1)
    assert own_pages(cluster) == 14
    cluster.check()


def test_pages_in_decode_device_memory_alone_are_not_offered(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(), cluster.decode()
    hashes = cluster.stored("a", 20)
    decode.request(1, hashes, prefill.name, held=2, match=10)
    wait_for(lambda: cluster.wire.sent(Hello))
    job = prefill.request(1, hashes)
    assert job.result() == 20
    job.check()
    decode.settle(1)
    assert not cluster.wire.sent(Offer)
    assert own_pages(cluster) == 20
    cluster.check()


def test_a_different_prompt_behind_the_same_room_is_declined(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(), cluster.decode()
    hashes, other = prompt("a", 12), prompt("b", 12)
    cluster.storage.put(hashes)
    decode.request(1, other, prefill.name, held=12)
    wait_for(lambda: cluster.wire.sent(Hello))
    job = prefill.request(1, hashes)
    assert job.result() == 12
    job.check()
    assert [message.reason for message in cluster.wire.sent(Decline)] == ["prompt_differs"]
    cluster.check()


def test_another_package_version_gets_no_offer_and_costs_no_wait(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", 12)
    send = cluster.wire.send

    def older(sender: str, receiver: str, message: object) -> bool:
        if isinstance(message, Hello):
            message = msgspec.structs.replace(message, package="0.0.0")
        return send(sender, receiver, message)  # type: ignore[arg-type]

    cluster.wire.send = older  # type: ignore[method-assign]
    job = prefill.request(1, hashes)
    decode.request(1, hashes, prefill.name)
    assert job.result() == 12
    assert job.ended_s - job.started_s < PATIENT.hello_silence_s / 2
    decode.settle(1)
    assert [message.reason for message in cluster.wire.sent(NoOffer)] == [NoOfferReason.VERSION]
    assert cluster.fallbacks("package_version") == 1
    cluster.check()


def test_an_engine_that_speaks_under_another_name_gets_no_offer(cluster: Cluster) -> None:
    _, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", 12)
    decode.reads.engine = "decode-2"
    job = cluster.request(hashes)
    assert job.result() == 12
    decode.settle(1)
    assert not cluster.wire.sent(Offer)
    assert cluster.fallbacks("engine_name") == 1
    cluster.check()


def test_a_request_without_a_room_is_read_by_prefill(cluster: Cluster) -> None:
    prefill = cluster.prefill()
    hashes = cluster.stored("a", 12)
    job = prefill.request(None, hashes)
    assert job.result() == 12
    job.check()
    cluster.check()


def test_a_later_attempt_of_a_settled_room_is_prefill_alone(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(), cluster.decode()
    hashes = cluster.stored("a", 16)
    assert cluster.request(hashes).result() == 16
    decode.settle(1)
    again = prefill.request(1, hashes)
    assert again.result() == 16
    again.check()
    assert len(cluster.wire.sent(Offer)) == 1
    cluster.check()


def test_samples_that_share_a_room_all_get_their_pages(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(), cluster.decode()
    hashes = cluster.stored("a", 24)
    cluster.storage.latency_s = 0.01
    decode.request(1, hashes, prefill.name)
    wait_for(lambda: cluster.wire.sent(Hello))
    jobs = [prefill.request(1, hashes) for _ in range(3)]
    for job in jobs:
        assert job.result() == 24
        job.check()
        prefill.reads.gone(job.prefetch.handle)
    assert not prefill.reads._room_of
    cluster.check()


def test_the_decode_engine_asks_for_no_more_than_its_bounds(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    hashes = cluster.stored("a", 60)
    decode.hop.latency_s = 0.02
    backing: list[int] = []
    decode.hop.fault = lambda session: backing.append(prefill.reserve.backing)
    job = cluster.request(hashes)
    while not job.done.is_set():
        backing.append(prefill.reserve.backing)
        job.done.wait(0.001)
    job.check()
    assert 0 < max(backing) <= 2 * PATIENT.claims_in_flight * 3
    claims = [message.max_pages for message in cluster.wire.sent(Claim)]
    assert max(claims) <= 3
    grants, words = cluster.wire.sent(Grant), cluster.wire.sent(Done)
    assert len(grants) == len(words) == len({word.claim_id for word in words})
    decode.settle(1)
    cluster.check()


def test_pages_in_decode_memory_lengthen_a_hit(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = cluster.prefill(), cluster.decode()
    prefill.reads.arrived(1, "handle")
    assert prefill.reads.held_pages("other", 3, 9) == 0
    assert prefill.reads.held_pages("handle", 9, 9) == 0
    assert prefill.reads.held_pages("handle", 3, 9) == 0  # no HELLO within the moment that is waited
    monkeypatch.setattr(prefill_reads, "_HELLO_GRACE_S", WAIT_S)
    cluster.wire.delay_s = 0.1  # so that it comes while the hit query waits for it
    decode.request(1, prompt("a", 8), prefill.name, held=8)
    assert prefill.reads.held_pages("handle", 3, 9) == 8
    monkeypatch.setattr(prefill_reads, "_HELLO_GRACE_S", 0.0)
    assert prefill.reads.held_pages("handle", 3, 9) == 8  # at once: it is known by now
    prefill.reads.gone("handle")
    decode.settle(1)
    cluster.check()


def test_a_policy_is_shown_the_measured_rates_of_the_decode_engine(cluster: Cluster) -> None:
    Watching.views.clear()
    prefill, decode = cluster.prefill(policy="tests.reader.watching:Watching"), cluster.decode()
    cluster.storage.latency_s = 0.3
    for room in (1, 2):
        hashes = cluster.stored(str(room), PAGES)
        decode.request(room, hashes, prefill.name)
        wait_for(lambda room=room: room in prefill.reads.rooms, "its HELLO is here")
        assert prefill.request(room, hashes).result() == PAGES
        decode.settle(room)
        cluster.storage.latency_s = 0.0  # what is shown comes with HELLO
    first, second = Watching.views
    assert first is not None
    assert (first.read_bytes_per_s, first.hop_bytes_per_s) == (None, None)
    assert second is not None
    assert second.read_bytes_per_s is not None
    assert second.hop_bytes_per_s is not None
    # Pages of the test engines are copied within one process: faster than they are read, even if that is held up.
    assert second.hop_bytes_per_s > second.read_bytes_per_s
    cluster.check()


def test_a_late_hello_gets_a_share_of_what_is_left(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="split"), cluster.decode()
    hashes = cluster.stored("a", PAGES)
    cluster.storage.gate.clear()
    prefill.reads.silent_requests = 10  # none was heard lately, so the plan is made at once
    job = prefill.request(1, hashes)
    wait_for(lambda: cluster.fallbacks("no_hello"))
    decode.request(1, hashes, prefill.name)
    wait_for(lambda: cluster.storage.in_flight == 2, "both read")
    cluster.storage.gate.set()
    assert job.result() == PAGES
    job.check()
    decode.settle(1)
    assert decode_pages(cluster) > 0
    assert set(cluster.storage.reads.values()) == {1}
    cluster.check()


def test_a_decode_engine_hears_of_a_request_that_asks_storage_for_nothing(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(), cluster.decode()
    hashes = prompt("a", 9)
    handle = object()
    prefill.reads.arrived(1, handle)
    decode.request(1, hashes, prefill.name)
    wait_for(lambda: cluster.wire.sent(Queued))
    prefill.reads.passed_over(handle)
    decode.settle(1)
    assert [word.reason for word in cluster.wire.sent(NoOffer)] == [NoOfferReason.NOT_ASKED]
    prefill.reads.declined(handle, NoOfferReason.NO_HITS)
    prefill.reads.passed_over(handle)  # after another word nothing more is said
    assert prefill.reads.rooms[1].closed is NoOfferReason.NO_HITS
    cluster.check()
