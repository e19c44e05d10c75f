"""How long each side waits for a word of the other, and when it does not wait."""

from __future__ import annotations

import msgspec
import pytest

from sglang_dualpath.protocol import Hello, NoOffer, NoOfferReason
from sglang_dualpath.reader import prefill as prefill_reads
from tests.reader.cluster import CONFIG, PATIENT, Cluster, prompt, wait_for
from tests.reader.host import WAIT_S

# The config of an engine that is to wait less is given by the test.
pytestmark = pytest.mark.usefixtures("patient")


def test_a_hello_that_never_comes_is_waited_for_and_then_not(cluster: Cluster) -> None:
    prefill = cluster.prefill(policy="decode", config=CONFIG)
    hashes = cluster.stored("a", 12)
    first = prefill.request(1, hashes)
    assert first.result() == 12
    assert CONFIG.hello_silence_s <= first.ended_s - first.started_s < CONFIG.read_deadline_s / 2
    for room in range(2, 5):
        assert prefill.request(room, hashes).result() == 12
    # Now the decode servers are taken to run without DualPath. A wait would be far longer than anything else.
    prefill.reads.config = PATIENT
    last = prefill.request(5, hashes)
    assert last.result(2 * PATIENT.hello_silence_s) == 12
    assert last.ended_s - last.started_s < PATIENT.hello_silence_s / 2
    assert cluster.fallbacks("no_hello") == 5
    cluster.check()


def test_split_reads_ahead_without_a_hello(cluster: Cluster) -> None:
    prefill = cluster.prefill(policy="split")
    hashes = cluster.stored("a", 12)
    job = prefill.request(1, hashes)
    assert job.result() == 12
    assert job.ended_s - job.started_s < PATIENT.hello_silence_s / 2
    job.check()
    cluster.check()


def test_no_endpoint_lets_the_request_go_on(cluster: Cluster) -> None:
    decode = cluster.decode()
    decode.request(1, prompt("a", 4), None)
    assert not decode.reads.pending(1)
    assert cluster.fallbacks("prefill_without_dualpath") == 1
    cluster.check()


def test_an_endpoint_that_is_never_found_lets_the_request_go_on(cluster: Cluster) -> None:
    # Long before its deadline.
    decode = cluster.decode(config=msgspec.structs.replace(PATIENT, hello_silence_s=CONFIG.hello_silence_s))
    read = decode.reads.accepted(1, object(), match_pages=0, held_slots=[], held_hashes=[])
    decode.reads.sought(read)
    assert decode.reads.pending(1)
    decode.settle(1)
    cluster.check()


def test_a_request_that_never_reaches_prefill_settles(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(), cluster.decode()
    prefill.reads.arrived(1, "handle")
    decode.request(1, prompt("a", 4), prefill.name)
    wait_for(lambda: cluster.wire.sent(Hello))
    prefill.reads.declined("handle", NoOfferReason.NO_HITS)
    decode.settle(1)  # before it would take the prefill engine for dead
    assert [message.reason for message in cluster.wire.sent(NoOffer)] == [NoOfferReason.NO_HITS]
    prefill.reads.gone("handle")
    assert not prefill.reads._room_of
    cluster.check()


def test_a_waiting_decode_engine_hears_that_prefill_lives(cluster: Cluster) -> None:
    # It hears so three times a second, and would wait for three seconds.
    prefill = cluster.prefill(config=CONFIG)
    decode = cluster.decode(config=msgspec.structs.replace(PATIENT, hello_silence_s=3.0))
    prefill.reads.arrived(1, "handle")
    read = decode.request(1, prompt("a", 4), prefill.name)
    wait_for(lambda: read.deadline_s - decode.reads.clock() < PATIENT.read_deadline_s - 3.3)
    assert decode.reads.pending(1)
    prefill.reads.gone("handle")
    decode.settle(1)
    assert cluster.fallbacks("prefill_silent") == 0
    cluster.check()


def test_a_policy_that_never_asks_decode_waits_for_no_hello(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_reads, "_HELLO_GRACE_S", WAIT_S)
    prefill = cluster.prefill(policy="prefill")
    prefill.reads.arrived(1, "handle")
    started = prefill.reads.clock()
    assert prefill.reads.held_pages("handle", 3, 9) == 0
    assert prefill.reads.clock() - started < WAIT_S / 2
