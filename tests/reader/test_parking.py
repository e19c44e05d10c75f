"""Reads whose prefetch finds no room in SGLang, now or at all: what is counted, and what is pushed all the same."""

from __future__ import annotations

import pytest

from sglang_dualpath.protocol import Hello
from sglang_dualpath.reader.hop import HopReader
from tests.reader.cluster import Cluster, prompt, wait_for


def parked(cluster: Cluster, role: str, reason: str) -> float:
    return cluster.counted(f'sglang_dualpath_parked_total{{engine_role="{role}",reason="{reason}"}}')


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "waits (" in record.getMessage()]


def test_a_request_that_is_parked_again_at_prefill_counts_once(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    reads = cluster.prefill().reads
    with caplog.at_level("INFO"):
        for reason in ("prefetch_rate_limited", "host_pool_full", "prefetch_rate_limited"):
            reads.arrived(1, "one")  # as for every try
            reads.parked("one", reason)
        reads.arrived(2, "two")
        reads.parked("two", "host_pool_full")
    assert parked(cluster, "prefill", "prefetch_rate_limited") == 1
    assert parked(cluster, "prefill", "host_pool_full") == 1
    assert lines(caplog) == [
        "DualPath read of room 1 waits (prefetch_rate_limited).",
        "DualPath read of room 2 waits (host_pool_full).",
    ]


def test_a_request_without_a_room_is_parked_without_a_word(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        cluster.prefill().reads.parked("warm-up", "host_pool_full")
    assert parked(cluster, "prefill", "host_pool_full") == 0
    assert not lines(caplog)


def test_a_read_that_is_parked_again_at_decode_counts_once(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    cluster.wire.join(decode.name, decode.reads.handle, lambda: decode.reads.tick(0.0))  # the test is the scheduler
    hashes = cluster.stored("a", 6)
    with caplog.at_level("INFO"):
        read = decode.request(1, hashes, prefill.name)
        job = prefill.request(1, hashes)
        wait_for(lambda: read in decode.reads.take_offers())
        for reason in ("prefetch_rate_limited", "host_pool_full", "host_pool_full"):
            decode.reads.parked(read, 0.0, reason)
            assert read in decode.reads.take_offers()
        decode.reads.without_prefetch(read, "enough of it")
    assert job.result() == 6
    assert parked(cluster, "decode", "prefetch_rate_limited") == 1
    assert parked(cluster, "decode", "host_pool_full") == 0
    assert lines(caplog) == ["DualPath read of room 1 waits (prefetch_rate_limited)."]
    decode.reads.over()


def test_what_was_granted_from_memory_is_pushed_although_nothing_is_prefetched(cluster: Cluster) -> None:
    prefill, decode = cluster.prefill(policy="decode"), cluster.decode()
    cluster.wire.join(decode.name, decode.reads.handle, lambda: decode.reads.tick(0.0))  # the test is the scheduler
    decode.carrier.stop()  # a thread that has other work for now
    hashes = prompt("a", 2)  # one chunk
    read = decode.request(1, hashes, prefill.name, held=2)
    wait_for(lambda: cluster.wire.sent(Hello))
    job = prefill.request(1, hashes, stored=0)  # nobody else has these pages
    wait_for(lambda: read.granted and not read.memory_left)
    decode.reads.without_prefetch(read, "below_threshold")
    decode.carrier = HopReader(decode.reads, decode.hop, count=1, limit=decode.limit)
    assert job.result() == 2
    job.check()
    decode.reads.over()
    cluster.check()
